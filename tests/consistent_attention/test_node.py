"""Apply Consistent Self-Attention on the real host: exact, deterministic, and it leaves the model alone."""

import functools

import comfy.sample
import comfy.samplers
import pytest
import torch
from storydiffusion.nodes.consistent_attention.blocks import choose_blocks
from storydiffusion.nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention
from storydiffusion.nodes.consistent_attention.token_sampling import draw_tokens
from storydiffusion.nodes.host.noise_level import STEP_KEY, current_step, noise_level_of
from storydiffusion.nodes.host.unet import blocks_with_attention
from storydiffusion.nodes.story.model import Panel, Story

PROMPTS = [
    "a man walks",
    "a man sleeps in the rain",
    "a man reads a book",
    "a cat",
    "a dog",
    "a house",
    "a tree",
]


def apply(model, sampling_rate=0.5, seed=0, start_percent=0.0, end_percent=1.0, blocks="decoder", window=0, story=None):
    return StoryApplyConsistentSelfAttention.execute(
        model, sampling_rate, seed, start_percent, end_percent, blocks, window, story
    ).result[0]


@functools.cache  # a full-size text encoder on a CPU costs more than the sampling
def encode(clip, prompt):
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def per_panel(clip, prompts):
    rows = [encode(clip, prompt)[0] for prompt in prompts]
    options = dict(rows[0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([row[1]["pooled_output"] for row in rows])
    return [[torch.cat([row[0] for row in rows]), options]]


def sample(
    model,
    clip,
    panels=3,
    size=(8, 8),
    sampler="ddim",
    cfg=5.0,
    steps=2,
    positive=None,
    negative=None,
    seed=5,
    scheduler="normal",
):
    latent = torch.zeros(panels, 4, *size)
    noise = comfy.sample.prepare_noise(latent, seed)
    positive = per_panel(clip, PROMPTS[:panels]) if positive is None else positive
    negative = encode(clip, "blurry") if negative is None else negative
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, disable_pbar=True, seed=seed
    )


class Recorder:
    """Real inputs and outputs of one self-attention layer, and what the host told it, per model call."""

    def __init__(self, model, block, transformer=0):
        kind, number = block
        unet = model.model.diffusion_model
        layers = unet.middle_block if kind == "middle" else getattr(unet, f"{kind}_blocks")[number]
        spatial = next(layer for layer in layers if hasattr(layer, "transformer_blocks"))
        self.layer = spatial.transformer_blocks[transformer]
        self.hidden, self.out, self.chunks, self.steps = [], [], [], []

    def __enter__(self):
        self.hooks = [
            self.layer.norm1.register_forward_hook(lambda _m, _a, out: self.hidden.append(out.clone())),
            self.layer.attn1.to_out.register_forward_pre_hook(lambda _m, a: self.out.append(a[0].clone())),
            self.layer.register_forward_pre_hook(self.note_options, with_kwargs=True),
        ]
        return self

    def note_options(self, _module, _args, kwargs):
        self.chunks.append(len(kwargs["transformer_options"]["cond_or_uncond"]))
        self.steps.append(kwargs["transformer_options"][STEP_KEY].noise_level)

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def equation_3(hidden, attention, chunks, sampled):
    """Equations 2 and 3 as the paper writes them: gather unprojected tokens, project, attend; in float64."""
    to_q, to_k, to_v = (getattr(attention, name).weight.double() for name in ("to_q", "to_k", "to_v"))
    heads, panels = attention.heads, hidden.shape[0] // chunks
    out = []
    for row, own in enumerate(hidden.double()):
        chunk, reader = divmod(row, panels)
        others = [hidden[chunk * panels + j, sampled[j]].double() for j in range(panels) if j != reader]
        paired = torch.cat([*others, own])
        q, k, v = own @ to_q.T, paired @ to_k.T, paired @ to_v.T
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        out.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.stack(out)


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("block", [("output", 1), ("output", 3), ("input", 1), ("middle", 0)])
def test_equals_the_papers_equations_on_the_models_own_hidden_states(tiny_sd15, block):
    model, clip, _ = tiny_sd15
    with Recorder(model, block) as record:
        sample(apply(model, seed=11, blocks="all"), clip)
    assert record.chunks == [2, 2]
    for step, hidden, out in zip(record.steps, record.hidden, record.out, strict=True):
        draw = [draw_tokens(hidden.shape[1], 0.5, draw=(11, step, (*block, 0), panel)).sampled for panel in range(3)]
        reference = equation_3(hidden, record.layer.attn1, 2, draw)
        assert ((out.double() - reference).norm() / reference.norm()).item() <= 1e-6


@pytest.mark.slow
def test_equals_the_papers_equations_in_deep_sdxl_blocks(tiny_sdxl):
    model, clip, _ = tiny_sdxl
    with Recorder(model, ("input", 5), transformer=3) as record:
        sample(apply(model, blocks="all"), clip, steps=1)
    hidden, out, step = record.hidden[0], record.out[0], record.steps[0]
    draw = [draw_tokens(hidden.shape[1], 0.5, draw=(0, step, ("input", 5, 3), panel)).sampled for panel in range(3)]
    reference = equation_3(hidden, record.layer.attn1, 2, draw)
    assert ((out.double() - reference).norm() / reference.norm()).item() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("panels", "rate"), [(3, 0.0), (1, 0.5), (1, 1.0)])
def test_rate_zero_and_a_single_panel_equal_the_stock_model_bit_for_bit(checkpoint, panels, rate):
    model, clip, _ = checkpoint
    stock = sample(model, clip, panels=panels)
    assert torch.equal(sample(apply(model, rate, blocks="all"), clip, panels=panels), stock)


@pytest.mark.slow
def test_the_seed_alone_decides(checkpoint):
    model, clip, _ = checkpoint
    first = sample(apply(model, seed=1), clip)
    sample(apply(model, seed=2), clip, panels=2, sampler="euler_ancestral")
    patched = apply(model, seed=1)
    assert torch.equal(sample(patched, clip), first)
    assert torch.equal(sample(patched, clip), first)  # a cached MODEL output is sampled again and again
    assert not torch.equal(sample(apply(model, seed=2), clip), first)


@pytest.mark.slow
def test_sharing_changes_every_panel_and_leaves_the_stock_model_alone(checkpoint):
    model, clip, _ = checkpoint
    before = sample(model, clip)
    shared = sample(apply(model), clip)
    assert all(not torch.equal(a, b) for a, b in zip(shared, before, strict=True))
    assert torch.equal(sample(model, clip), before)
    assert "patches_replace" not in model.model_options["transformer_options"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "panels"),
    [("ddim", 1), ("ddim", 2), ("ddim", 7), ("euler_ancestral", 3), ("heun", 3), ("dpmpp_2m_sde", 3)],
)
def test_samplers_and_panel_counts(tiny_sd15, sampler, panels):
    model, clip, _ = tiny_sd15
    latents = sample(apply(model), clip, panels=panels, sampler=sampler)
    assert latents.shape == (panels, 4, 8, 8)
    assert latents.isfinite().all()
    assert torch.equal(latents, sample(model, clip, panels=panels, sampler=sampler)) == (panels == 1)


@pytest.mark.slow
def test_heun_asks_twice_in_a_step_and_each_call_knows_its_step(tiny_sd15):
    model, clip, _ = tiny_sd15
    with Recorder(model, ("output", 1)) as record:
        sample(apply(model), clip, sampler="heun", steps=3)
    first, second, third = sorted(set(record.steps), reverse=True)
    assert record.steps == [first, second, second, third, third]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "size"),
    [("tiny_sd15", (17, 25)), ("tiny_sd15", (9, 8)), ("tiny_sdxl", (17, 25))],
    indirect=["checkpoint"],
)
def test_sizes_that_the_levels_do_not_divide(checkpoint, size):
    """136 x 200 pixels is 17 x 25 latents, whose lower levels are rounded up."""
    model, clip, _ = checkpoint
    latents = sample(apply(model, blocks="all"), clip, panels=2, size=size, steps=1)
    assert latents.shape == (2, 4, *size)
    assert latents.isfinite().all()
    assert not torch.equal(latents, sample(model, clip, panels=2, size=size, steps=1))


def chunk_cases(clip):
    long_negative = encode(clip, "blurry " * 330)
    return {
        "together": ([2], {}),
        "cfg 1": ([1], {"cfg": 1.0}),
        "long negative": ([1, 1], {"negative": long_negative}),
        "combined positives": (
            [3],
            {"positive": per_panel(clip, PROMPTS[:3]) + per_panel(clip, PROMPTS[3:6])},
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", ["together", "cfg 1", "long negative", "combined positives"])
def test_chunk_orders_are_each_exact(tiny_sd15, case):
    model, clip, _ = tiny_sd15
    chunks, arguments = chunk_cases(clip)[case]
    with Recorder(model, ("output", 2)) as record:
        sample(apply(model), clip, steps=1, **arguments)
    assert record.chunks == chunks
    for count, step, hidden, out in zip(record.chunks, record.steps, record.hidden, record.out, strict=True):
        draw = [
            draw_tokens(hidden.shape[1], 0.5, draw=(0, step, ("output", 2, 0), panel)).sampled for panel in range(3)
        ]
        reference = equation_3(hidden, record.layer.attn1, count, draw)
        assert ((out.double() - reference).norm() / reference.norm()).item() <= 1e-6


@pytest.mark.slow
def test_together_or_apart_the_halves_of_guidance_come_out_alike(tiny_sd15):
    """A long negative is run apart from the positive: the positive must not notice."""
    model, clip, _ = tiny_sd15
    outputs = []

    def keep_cond(arguments):
        outputs.append(arguments["cond_denoised"].clone())
        return arguments["denoised"]

    patched = apply(model)
    patched.set_model_sampler_post_cfg_function(keep_cond)
    sample(patched, clip, steps=1)
    sample(patched, clip, steps=1, negative=encode(clip, "blurry " * 330))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def story(*casts):
    return Story(tuple(Panel("a man", "", cast) for cast in casts), "")


@pytest.mark.slow
def test_story_routes_by_character(tiny_sd15):
    model, clip, _ = tiny_sd15
    plain = sample(model, clip, panels=4)
    routed = sample(apply(model, story=story(("Bob",), ("Ann",), (), ("Bob",))), clip, panels=4)
    # Only Bob's two panels share; the others come out as on the stock model.
    torch.testing.assert_close(routed[1:3], plain[1:3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(routed[0], plain[0], atol=1e-2)
    assert not torch.allclose(routed[3], plain[3], atol=1e-2)


@pytest.mark.slow
def test_start_and_end(tiny_sd15):
    model, clip, _ = tiny_sd15
    stock = sample(model, clip, steps=4)
    whole = sample(apply(model), clip, steps=4)
    late = sample(apply(model, start_percent=0.5), clip, steps=4)
    early = sample(apply(model, end_percent=0.5), clip, steps=4)
    results = [stock, whole, late, early]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    never = sample(apply(model, start_percent=0.9), clip, steps=4, scheduler="sgm_uniform")  # last step at 75%
    assert torch.equal(never, sample(model, clip, steps=4, scheduler="sgm_uniform"))


def test_block_choices(tiny_sd15, tiny_sdxl):
    def keys(blocks, choice):
        return [block.key for block in choose_blocks(blocks, choice)]

    sd15 = blocks_with_attention(tiny_sd15[0].model.diffusion_model)
    assert keys(sd15, "all") == [("input", 1), ("input", 3), ("middle", 0)] + [("output", n) for n in range(4)]
    assert keys(sd15, "decoder") == [("output", n) for n in range(4)]
    assert keys(sd15, "decoder_upper_levels") == [("output", 2), ("output", 3)]
    sdxl = blocks_with_attention(tiny_sdxl[0].model.diffusion_model)
    assert keys(sdxl, "decoder_upper_levels") == [("output", 2), ("output", 3)]
    with pytest.raises(ValueError, match="'none'"):
        choose_blocks(sd15, "none")


def test_chains_onto_what_owns_a_block_already(tiny_sd15):
    model, clip, _ = tiny_sd15
    seen = []

    def earlier(q, k, v, extra_options):
        seen.append((extra_options["block"], q.shape[1], k.shape[1]))
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"])

    owned = model.clone()
    owned.set_model_attn1_replace(earlier, "output", 1)
    owned.set_model_attn1_replace(earlier, "output", 2, 0)
    chained = sample(apply(owned), clip, panels=2, steps=1)
    assert {block for block, _, _ in seen} == {("output", 1), ("output", 2)}
    assert {(q, k) for _, q, k in seen} == {(16, 24), (64, 96)}
    torch.testing.assert_close(chained, sample(apply(model), clip, panels=2, steps=1))


def test_an_attention_override_of_another_node_is_asked(tiny_sd15):
    model, clip, _ = tiny_sd15
    keys = []

    def override(attention, *args, **kwargs):
        keys.append(args[1].shape[1])
        return attention(*args, **kwargs)

    overridden = model.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = override
    sample(apply(overridden), clip, panels=2, steps=1)
    assert 96 in keys  # 64 own tokens and 32 of the other panel


@pytest.mark.parametrize(
    ("sigma", "start"), [(15.0, 14.0), (14.0, 14.0), (10.0001, 10.0), (9.0, 10.0), (5.0, 5.0), (0.1, 5.0), (0.0, 0.0)]
)
def test_current_step(sigma, start):
    schedule = [14.0, 10.0, 5.0, 0.0]
    assert current_step(sigma, schedule).noise_level == noise_level_of(start)
    assert current_step(sigma, schedule[::-1]).noise_level == noise_level_of(start)  # from picture to noise


@pytest.mark.parametrize("steps", [20, 50, 500, 1000])
@pytest.mark.parametrize("scheduler", ["normal", "karras", "ddim_uniform", "beta", "exponential"])
def test_every_step_of_a_schedule_has_a_number_of_its_own(tiny_sd15, steps, scheduler):
    sampling = tiny_sd15[0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).tolist()
    starts = sorted(set(sigmas[:-1]))
    assert len({current_step(sigma, sigmas).noise_level for sigma in starts}) == len(starts)
    halves = [part for part in (sigmas[: steps // 2 + 1], sigmas[steps // 2 :]) if len(part) > 1]
    for part in halves:
        for sigma in part[:-1]:
            assert current_step(sigma, part).noise_level == current_step(sigma, sigmas).noise_level


def test_a_step_has_one_number_in_any_part_of_its_schedule():
    schedule = [14.0, 10.0, 5.0, 1.0, 0.0]
    for sigma in (10.0, 7.0, 5.0):
        assert current_step(sigma, schedule[1:]) == current_step(sigma, schedule)
        assert current_step(sigma, schedule[:3]) == current_step(sigma, schedule)
    assert len({current_step(sigma, schedule).noise_level for sigma in schedule}) == 5


class TestErrors:
    """Each says what is wrong, with its value, and what to do."""

    def test_surplus_conditioning_rows(self, tiny_sd15):
        model, clip, _ = tiny_sd15
        with pytest.raises(ValueError, match=r"positive conditioning has 4 rows .* latent batch has 3"):
            sample(apply(model), clip, panels=3, positive=per_panel(clip, PROMPTS[:4]))

    def test_missing_conditioning_rows(self, tiny_sd15):
        model, clip, _ = tiny_sd15
        with pytest.raises(ValueError, match=r"negative conditioning has 2 rows .* latent batch has 3"):
            sample(apply(model), clip, panels=3, negative=per_panel(clip, PROMPTS[:2]))

    def test_story_of_another_length(self, tiny_sd15):
        model, clip, _ = tiny_sd15
        with pytest.raises(ValueError, match=r"has 2 panels, but the latent batch has 3"):
            sample(apply(model, story=story(("Bob",), ("Bob",))), clip, panels=3)

    @pytest.mark.parametrize("rate", [-0.5, 1.5])
    def test_rate_out_of_range(self, tiny_sd15, rate):
        with pytest.raises(ValueError, match=f"sampling_rate is {rate}"):
            apply(tiny_sd15[0], rate)

    def test_start_not_before_end(self, tiny_sd15):
        with pytest.raises(ValueError, match=r"start_percent is 0.8; it must be below end_percent, which is 0.3"):
            apply(tiny_sd15[0], start_percent=0.8, end_percent=0.3)

    def test_applied_twice(self, tiny_sd15):
        with pytest.raises(ValueError, match="has Consistent Self-Attention already"):
            apply(apply(tiny_sd15[0]))

    def test_tiled_tokens(self, tiny_sd15):
        from comfy_extras.nodes_hypertile import HyperTile

        model, clip, _ = tiny_sd15
        tiled = HyperTile.execute(model, tile_size=32, swap_size=2, max_depth=0, scale_depth=False)[0]
        with pytest.raises(ValueError, match="HyperTile"):
            sample(apply(tiled), clip, panels=2, size=(16, 16), steps=1)

    def test_merged_tokens(self, tiny_sd15):
        from comfy_extras.nodes_tomesd import TomePatchModel

        model, clip, _ = tiny_sd15
        merged = TomePatchModel.execute(model, 0.5).result[0]
        with pytest.raises(ValueError, match="Token Merging"):
            sample(apply(merged), clip, panels=2, size=(16, 16), steps=1)

    def test_a_model_that_is_no_unet(self):
        import comfy.model_base
        import comfy.model_patcher
        import comfy.supported_models

        config = comfy.supported_models.Flux(
            {
                "image_model": "flux",
                "in_channels": 16,
                "patch_size": 2,
                "out_channels": 16,
                "vec_in_dim": 8,
                "context_in_dim": 8,
                "hidden_size": 32,
                "mlp_ratio": 1.0,
                "num_heads": 2,
                "depth": 1,
                "depth_single_blocks": 1,
                "axes_dim": [4, 6, 6],
                "txt_ids_dims": [],
                "theta": 10000,
                "qkv_bias": True,
                "guidance_embed": False,
            }
        )
        config.unet_config["dtype"] = torch.float32
        model = comfy.model_patcher.ModelPatcher(
            comfy.model_base.Flux(config), load_device=torch.device("cpu"), offload_device=torch.device("cpu")
        )
        with pytest.raises(ValueError, match="this model is a Flux"):
            apply(model)
