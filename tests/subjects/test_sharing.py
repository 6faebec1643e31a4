"""Strength, token choice, level rates and subject masks of Consistent Self-Attention, on the real host."""

import comfy.sample
import pytest
import torch
from storydiffusion.nodes.consistent_attention.level_rates import parse_level_rates
from storydiffusion.nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention
from storydiffusion.nodes.consistent_attention.token_sampling import draw_tokens
from storydiffusion.nodes.host.noise_level import STEP_KEY
from storydiffusion.nodes.host.unet import blocks_with_attention
from storydiffusion.nodes.prompts.nodes import StoryEncodePrompts
from storydiffusion.nodes.prompts.subject_tokens import SUBJECTS_KEY
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.nodes.subjects.given_masks import set_subject_masks
from storydiffusion.nodes.subjects.maps import MAPS_KEY

SHEET = "[Bob] a man with a red hat\n[Ann] a tall girl, in a blue dress"
MEETING = parse_story("[Bob] and [Ann] dance\n[Bob] walks\n[Ann] sleeps", SHEET)
BOB = parse_story("[Bob] sings\n[Bob] walks\n[Bob] sleeps", SHEET)


@pytest.fixture(scope="module")
def encoded(tiny_sd15):
    """Conditionings of the two stories: a full-size text encoder on a CPU costs more than the sampling."""
    return {id(story): StoryEncodePrompts.execute(tiny_sd15[1], story).result for story in (MEETING, BOB)}


@pytest.fixture
def sample(tiny_sd15, encoded):
    def run(model, story=BOB, *, steps=2, conditioning=None, cfg=5.0):
        positive, negative = conditioning or encoded[id(story)]
        latent = torch.zeros(len(story.panels), 4, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 5)
        return comfy.sample.sample(
            model, noise, steps, cfg, "ddim", "normal", positive, negative, latent, disable_pbar=True, seed=5
        )

    return run


def apply(model, story=None, *, sampling_rate=0.5, blocks="decoder", seed=0, window=0, **knobs):
    node = StoryApplyConsistentSelfAttention
    return node.execute(model, sampling_rate, seed, 0.0, 1.0, blocks, window, story, **knobs).result[0]


def keep(seen, name):
    """Hook that keeps the first output of a module (or input, before it)."""

    def hook(_module, arguments, output=None):
        seen.setdefault(name, (arguments[0] if output is None else output).clone())

    return hook


def keep_options(seen):
    """Hook that keeps what the host tells a layer."""

    def hook(_module, _arguments, keywords):
        seen.setdefault("options", keywords["transformer_options"])

    return hook


class TestStrength:
    """The log-weight of the other panels' keys."""

    @pytest.mark.slow
    def test_zero_is_the_stock_model_and_one_the_paper_bit_for_bit(self, tiny_sd15, sample):
        model = tiny_sd15[0]
        assert torch.equal(sample(apply(model, strength=0.0)), sample(model))
        assert torch.equal(sample(apply(model, strength=1.0)), sample(apply(model)))

    @pytest.mark.slow
    def test_between_lies_between(self, tiny_sd15, sample):
        model = tiny_sd15[0]
        stock, paper = sample(model, steps=1), sample(apply(model), steps=1)
        distances = [(sample(apply(model, strength=s), steps=1) - stock).norm().item() for s in (0.1, 0.4, 0.8)]
        assert 0 < distances[0] < distances[1] < distances[2] < (paper - stock).norm().item()

    def test_equals_the_paper_equation_with_weighted_keys(self, tiny_sd15, sample):
        """One layer's real hidden states; the reference multiplies exponentials."""
        model = tiny_sd15[0]
        layer = next(
            part for part in model.model.diffusion_model.output_blocks[1] if hasattr(part, "transformer_blocks")
        ).transformer_blocks[0]
        seen = {}
        hooks = [
            layer.norm1.register_forward_hook(keep(seen, "hidden")),
            layer.attn1.to_out.register_forward_pre_hook(keep(seen, "out")),
            layer.register_forward_pre_hook(keep_options(seen), with_kwargs=True),
        ]
        try:
            sample(apply(model, strength=0.3, seed=9), steps=1)
        finally:
            for hook in hooks:
                hook.remove()
        hidden, attention = seen["hidden"].double(), layer.attn1
        weights = [getattr(attention, name).weight.double() for name in ("to_q", "to_k", "to_v")]
        tokens = hidden.shape[1]
        step = seen["options"][STEP_KEY].noise_level
        sampled = [draw_tokens(tokens, 0.5, draw=(9, step, ("output", 1, 0), panel)).sampled for panel in range(3)]
        for row in range(6):
            chunk, reader = divmod(row, 3)
            others = [hidden[chunk * 3 + j, sampled[j]] for j in range(3) if j != reader]
            keys = torch.cat([hidden[row], *others])
            factor = torch.cat([torch.ones(tokens), torch.full((len(keys) - tokens,), 0.3)]).double()
            q, k, v = hidden[row] @ weights[0].T, keys @ weights[1].T, keys @ weights[2].T
            q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for t in (q, k, v))
            exponentials = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).exp() * factor
            reference = (exponentials / exponentials.sum(-1, keepdim=True) @ v).transpose(0, 1).flatten(1)
            assert ((seen["out"][row] - reference).norm() / reference.norm()).item() <= 1e-6


class TestTokenChoiceAndLevels:
    """Which tokens are given, and at which levels."""

    @pytest.mark.slow
    def test_a_grid_needs_no_seed(self, tiny_sd15, sample):
        model = tiny_sd15[0]
        first = sample(apply(model, token_choice="grid", seed=1))
        assert torch.equal(first, sample(apply(model, token_choice="grid", seed=2)))
        assert not torch.equal(first, sample(apply(model, seed=1)))
        whole = sample(apply(model, token_choice="grid", sampling_rate=1.0))
        assert torch.equal(whole, sample(apply(model, sampling_rate=1.0)))

    @pytest.mark.slow
    def test_rate_zero_at_the_lowest_level_is_the_upper_levels_alone(self, tiny_sd15, sample):
        model = tiny_sd15[0]
        lowest = max(block.downsampling for block in blocks_with_attention(model.model.diffusion_model))
        upper = sample(apply(model, blocks="decoder_upper_levels"))
        assert torch.equal(sample(apply(model, level_rates=f"{lowest}: 0")), upper)
        assert not torch.equal(sample(apply(model, level_rates=f"{lowest}: 0.2")), upper)

    def test_a_pair_per_level(self):
        assert parse_level_rates(" 1:0.3 ,2 : 1", {1, 2}) == {1: 0.3, 2: 1.0}
        assert parse_level_rates("", {1, 2}) == {}

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("0.3", "'0.3'; write"),
            ("16: 0.3", "level 16, but .* levels 1, 2"),
            ("2: 1.5", "level 2 the rate 1.5"),
            ("2: 0.1, 2: 0.3", "level 2 two rates"),
        ],
    )
    def test_refuses_what_it_cannot_read(self, tiny_sd15, text, complaint):
        with pytest.raises(ValueError, match=complaint):
            apply(tiny_sd15[0], level_rates=text)


class TestSubjects:
    """Who stands where decides what passes."""

    @pytest.mark.slow
    def test_watching_changes_nothing_by_itself(self, tiny_sd15, sample):
        model = tiny_sd15[0]
        assert torch.equal(sample(apply(model, MEETING, sampling_rate=0.0), MEETING), sample(model, MEETING))

    @pytest.mark.slow
    def test_masks_that_are_empty_leave_panels_plain_and_full_ones_share(self, tiny_sd15, sample):
        model = tiny_sd15[0]

        def masked(value):
            story = set_subject_masks(BOB, "Bob", torch.full((1, 8, 8), float(value)))
            return sample(apply(model, story, share="subjects"), steps=1)

        torch.testing.assert_close(masked(0), sample(model, steps=1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(masked(1), sample(apply(model, BOB), steps=1), rtol=1e-3, atol=1e-3)
        left = torch.zeros(1, 8, 8)
        left[..., :4] = 1
        story = set_subject_masks(BOB, "Bob", left)
        half = sample(apply(model, story, share="subjects"), steps=1)
        assert not torch.allclose(half, sample(model, steps=1), atol=1e-3)
        assert not torch.allclose(half, sample(apply(model, BOB), steps=1), atol=1e-3)

    def test_a_masked_layer_equals_attention_over_the_allowed_tokens(self, tiny_sd15, sample):
        """Tokens outside the mask come out of a layer as they do of the stock layer on the same input."""
        model = tiny_sd15[0]
        layer = next(
            part for part in model.model.diffusion_model.output_blocks[3] if hasattr(part, "transformer_blocks")
        ).transformer_blocks[0]
        seen = {}
        left = torch.zeros(1, 8, 8)
        left[..., :4] = 1
        story = set_subject_masks(BOB, "Bob", left)
        hooks = [
            layer.norm1.register_forward_hook(keep(seen, "hidden")),
            layer.attn1.to_out.register_forward_hook(keep(seen, "out")),
        ]
        try:
            sample(apply(model, story, share="subjects", level_rates="1: 1"), steps=1)
            ours = seen["out"]
            stock = layer.attn1(seen["hidden"])
        finally:
            for hook in hooks:
                hook.remove()
        inside = left.flatten().bool()
        torch.testing.assert_close(ours[:, ~inside], stock[:, ~inside], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours[:, inside], stock[:, inside], atol=1e-3)

    @pytest.mark.slow
    def test_one_character_alone_needs_no_masks(self, tiny_sd15, sample):
        model = tiny_sd15[0]
        assert MAPS_KEY not in model.model_options["transformer_options"]
        positive, negative = (
            [[tensor, {key: value for key, value in options.items() if key != SUBJECTS_KEY}]]
            for ((tensor, options),) in StoryEncodePrompts.execute(tiny_sd15[1], BOB).result
        )
        conditioning = (positive, negative)
        assert torch.equal(sample(apply(model, BOB), conditioning=conditioning), sample(apply(model)))

    @pytest.mark.slow
    def test_the_maps_decide_and_are_the_same_every_time(self, tiny_sd15, sample):
        model = tiny_sd15[0]
        patched = apply(model, MEETING)
        first = sample(patched, MEETING, steps=3)
        assert torch.equal(sample(patched, MEETING, steps=3), first)
        assert not torch.equal(sample(model, MEETING, steps=3), first)
        whole = set_subject_masks(set_subject_masks(MEETING, "Bob", left_half()), "Ann", 1 - left_half())
        assert not torch.allclose(sample(apply(model, whole), MEETING, steps=3), first, atol=1e-3)
        assert MAPS_KEY not in patched.model_options["transformer_options"]

    @pytest.mark.parametrize("window", [0, 2])
    def test_the_first_step_knows_where_they_stand(self, tiny_sd15, sample, window):
        """A single step shares already, in every window, and more than the background around the two."""
        model = tiny_sd15[0]
        plain, ours = (sample(shown, MEETING, steps=1) for shown in (model, apply(model, MEETING, window=window)))
        difference = (ours - plain).abs().amax((1, 2, 3))
        assert (difference > 1e-3).all()

    @pytest.mark.slow
    def test_looks_once_and_only_where_masks_leave_something_open(self, tiny_sd15, sample):
        model = tiny_sd15[0]
        calls = []

        def count(apply_model, call):
            calls.append(call["input"].shape[0])
            return apply_model(call["input"], call["timestep"], **call["c"])

        def calls_of(story, **changes):
            calls.clear()
            patched = apply(model, story, **changes)
            patched.set_model_unet_function_wrapper(count)
            sample(patched, MEETING, steps=2)
            return list(calls)

        assert calls_of(MEETING) == [3, 6, 6]  # the prompts that name them, then both halves of guidance
        known = set_subject_masks(set_subject_masks(MEETING, "Bob", left_half()), "Ann", 1 - left_half())
        assert calls_of(known) == [6, 6]
        assert calls_of(MEETING, strength=0.0) == calls_of(MEETING, sampling_rate=0.0) == [6, 6]  # nothing to share

    @pytest.mark.slow
    def test_the_halves_of_guidance_together_or_apart(self, tiny_sd15, sample, encoded):
        """A negative of another length is run apart from the positive: the panels must not notice."""
        model, clip, _ = tiny_sd15
        positive, _ = encoded[id(MEETING)]
        kept = []

        def keep(arguments):
            kept.append(arguments["cond_denoised"].clone())
            return arguments["cond_denoised"]

        patched = apply(model, MEETING)
        patched.set_model_sampler_post_cfg_function(keep)
        for words in ("blurry", "blurry " * 330):
            negative = clip.encode_from_tokens_scheduled(clip.tokenize(words))
            sample(patched, MEETING, conditioning=(positive, negative))
        torch.testing.assert_close(kept[0], kept[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept[1], kept[3], rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_windows_of_a_whole_story_change_nothing(self, tiny_sd15, sample):
        model = tiny_sd15[0]
        assert torch.equal(sample(apply(model, MEETING, window=3), MEETING), sample(apply(model, MEETING), MEETING))


def left_half():
    mask = torch.zeros(1, 16, 16)
    mask[..., :8] = 1
    return mask


class TestErrors:
    """Each says what is wrong, with its value, and what to do."""

    def test_subjects_without_a_story(self, tiny_sd15):
        with pytest.raises(ValueError, match=r"share is 'subjects'.*connect a story"):
            apply(tiny_sd15[0], share="subjects")

    def test_subjects_without_names(self, tiny_sd15):
        with pytest.raises(ValueError, match="names no character"):
            apply(tiny_sd15[0], parse_story("a man walks\nhe sleeps"), share="subjects")

    def test_prompts_encoded_elsewhere(self, tiny_sd15, sample, encoded):
        ((tensor, options),), negative = encoded[id(MEETING)]
        bare = [[tensor, {key: value for key, value in options.items() if key != SUBJECTS_KEY}]]
        with pytest.raises(ValueError, match=r"Panel 1: where \[Bob\] stands can't be found.*Encode Story Prompts"):
            sample(apply(tiny_sd15[0], MEETING), MEETING, conditioning=(bare, negative))

    @pytest.mark.slow
    def test_a_tag_within_a_word(self, tiny_sd15, sample):
        story = parse_story("[Bob] meets the[Ann] there\n[Bob] walks\n[Ann] sleeps", SHEET)
        conditioning = StoryEncodePrompts.execute(tiny_sd15[1], story).result
        with pytest.raises(ValueError, match=r"where \[Ann\] stands can't be found.*Put spaces around the tag"):
            sample(apply(tiny_sd15[0], story), story, conditioning=conditioning)

    def test_a_node_behind_that_replaces_cross_attention(self, tiny_sd15, sample):
        blinded = apply(tiny_sd15[0], MEETING)
        for key in list(blinded.model_options["transformer_options"]["patches_replace"]["attn2"]):
            blinded.set_model_attn2_replace(lambda q, k, v, options: q, *key)
        with pytest.raises(ValueError, match=r"where the characters stand can't be seen\. Connect that node before"):
            sample(blinded, MEETING)

    @pytest.mark.slow
    def test_one_cross_attention_replaced_behind(self, tiny_sd15, sample):
        blinded = apply(tiny_sd15[0], MEETING)
        blinded.set_model_attn2_replace(lambda q, k, v, options: q, "output", 2, 0)
        with pytest.raises(ValueError, match=r"in 1 of \d+ places \(the first in UNet block \('output', 2\)\)"):
            sample(blinded, MEETING)

    @pytest.mark.slow
    def test_rows_that_regional_prompts_add(self, tiny_sd15, sample):
        """As Attention Couple does: a row more for each region in cross-attention, taken together again behind it."""

        def with_regions(model):
            model = model.clone()
            model.set_model_attn2_patch(lambda q, k, v, options: (tensor.repeat(2, 1, 1) for tensor in (q, k, v)))
            model.set_model_attn2_output_patch(lambda out, options: out.unflatten(0, (2, -1)).mean(0))
            return model

        with pytest.raises(ValueError, match=r"rows for \d+ pictures, as nodes for regional .* Set Subject Masks"):
            sample(with_regions(apply(tiny_sd15[0], MEETING)), MEETING)
        known = set_subject_masks(set_subject_masks(MEETING, "Bob", left_half()), "Ann", 1 - left_half())
        alone, beside = (
            sample(apply(tiny_sd15[0], known), MEETING),
            sample(with_regions(apply(tiny_sd15[0], known)), MEETING),
        )
        torch.testing.assert_close(beside, alone, rtol=1e-3, atol=1e-3)

    def test_a_replacement_by_another_node_cannot_weigh_tokens(self, tiny_sd15):
        owned = tiny_sd15[0].clone()
        owned.set_model_attn1_replace(lambda q, k, v, options: q, "output", 1)
        with pytest.raises(ValueError, match="Another node has replaced the self-attention"):
            apply(owned, strength=0.5)
        with pytest.raises(ValueError, match="Another node has replaced the self-attention"):
            apply(owned, MEETING)

    @pytest.mark.parametrize(
        ("knob", "value"), [("strength", -0.1), ("strength", 1.5), ("share", "nothing"), ("token_choice", "best")]
    )
    def test_values_out_of_range(self, tiny_sd15, knob, value):
        with pytest.raises(ValueError, match=f"{knob} is {value!r}; it must"):
            apply(tiny_sd15[0], **{knob: value})
