"""The SMP nodes on the real host: its sampler, its SD1.5 UNet in SD1.5's own block layout, its CLIP
vision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.context_windows
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.supported_models
import folder_paths
import pytest
import torch
import torch.nn.functional as F
from comfy_extras.nodes_custom_sampler import Guider_DualCFG, Guider_DualModel
from safetensors.torch import save_file
from storydiffusion.devtools.tiny.motion import SD15_LAYOUT, seeded_sd15
from storydiffusion.devtools.tiny.smp import SeededIPAdapter, ip_adapter_tensors, tiny_clip_vision
from storydiffusion.nodes.host.attention import attention_of_call
from storydiffusion.nodes.host.model_files import register_model_folder
from storydiffusion.nodes.host.padded_text import leave_out_padding
from storydiffusion.nodes.host.types import LENGTHS_KEY
from storydiffusion.nodes.motion_predictor import patch as smp_patch
from storydiffusion.nodes.motion_predictor.loading import LoadedSMP
from storydiffusion.nodes.motion_predictor.nodes import StoryApplySMP, StoryLoadSMP, StorySemanticMotionPredictor
from storydiffusion.nodes.motion_predictor.patch import KEY
from storydiffusion.nodes.motion_predictor.predict import SMPEmbeds
from storydiffusion.smp.checkpoint import save_checkpoint
from storydiffusion.smp.config import CrossAttentionSite, ProjectionConfig, SMPConfig, SMPModelConfig
from storydiffusion.smp.injection import AddedKV
from storydiffusion.smp.model import SemanticMotion
from torch import Tensor

FRAMES = 4
SMALL_UNET = {**SD15_LAYOUT, "model_channels": 32, "channel_mult": [1, 2, 4, 4]}
CHANNELS = (32, 32, 64, 64, 128, 128, 128, 128, 128, 64, 64, 64, 32, 32, 32, 128)
BASE = SeededIPAdapter("ip-adapter_sd15.safetensors", plus=False, channels=CHANNELS)
PLUS = SeededIPAdapter("ip-adapter-plus_sd15.safetensors", plus=True, channels=CHANNELS)
LINEAR = "interpolation (linear)"

Conditioning = list[list[Any]]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """The host runs nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models folder with both kinds of IP-Adapter and a trained SMP, the one that the host knows meanwhile."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("ipadapter", "smp"):
            (folder / name).mkdir()
            _, extensions = folder_paths.folder_names_and_paths[name]
            monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(folder / name)], extensions))
            monkeypatch.delitem(folder_paths.filename_list_cache, name, raising=False)
        write_models(folder)
        yield folder


def write_models(folder: Path) -> None:
    for spec in (BASE, PLUS):
        save_file(ip_adapter_tensors(spec), folder / "ipadapter" / spec.file_name)
    torch.manual_seed(0)
    predictor = SMPConfig(tokens=1, width=1024, hidden=16, layers=1, heads=2, head_dim=4, max_frames=3)
    sites = tuple(CrossAttentionSite(*key, channels) for key, channels in zip(SITE_KEYS, CHANNELS, strict=True))
    config = SMPModelConfig(
        "image_embeds", 1024, sites, "concat", "zero", predictor, projection=ProjectionConfig(tokens=2)
    )
    motion, added_kv = SemanticMotion(config), AddedKV(sites, 768)
    for parameter in [*motion.parameters(), *added_kv.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(folder / "smp" / "trained.safetensors", motion, added_kv)


SITE_KEYS = [
    *(("input", number, 0) for number in (1, 2, 4, 5, 7, 8)),
    *(("output", number, 0) for number in range(3, 12)),
    ("middle", 0, 0),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return seeded_sd15(SMALL_UNET)


@pytest.fixture(scope="module")
def clip_vision() -> Any:
    return tiny_clip_vision()


def panels(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 40, 60, 3, generator=torch.Generator().manual_seed(seed))


def load(smp: str, ip_adapter: str) -> LoadedSMP:
    return StoryLoadSMP.execute(smp=smp, ip_adapter=ip_adapter).args[0]


def predict(clip_vision: Any, smp: LoadedSMP, count: int = 2, frames: int = FRAMES) -> SMPEmbeds:
    return StorySemanticMotionPredictor.execute(clip_vision, smp, panels(count), frames).args[0]


@pytest.fixture(scope="module")
def base(models: Path, clip_vision: Any) -> tuple[LoadedSMP, SMPEmbeds]:
    """Base IP-Adapter weights and the motion between two panels."""
    with torch.inference_mode():
        smp = load(LINEAR, BASE.file_name)
        return smp, predict(clip_vision, smp)


def apply(
    model: Any,
    smp: LoadedSMP,
    embeds: SMPEmbeds,
    *,
    pair_index: int = 0,
    strength: float = 1.0,
    guidance: str = "as trained",
) -> Any:
    return StoryApplySMP.execute(model, smp, embeds, pair_index, strength, guidance).args[0]


def text(seed: int, chunks: int = 1, rows: int = 1) -> Conditioning:
    return [[torch.randn(rows, 77 * chunks, 768, generator=torch.Generator().manual_seed(seed)), {}]]


def sample(
    model: Any,
    *,
    frames: int = FRAMES,
    cfg: float = 5.0,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
) -> Tensor:
    """One step of the host's sampler over a clip of 16 x 16 pixels."""
    noise = torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    return comfy.sample.sample(
        model,
        noise,
        1,
        cfg,
        "euler",
        "normal",
        positive or text(1),
        negative or text(2),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


def assert_same_clip(first: Tensor, second: Tensor) -> None:
    """Equal but for rounding, which CFG enlarges: one part in ten thousand of the largest value."""
    assert (first - second).abs().max() <= 1e-4 * second.abs().max()


def changed_frames(first: Tensor, second: Tensor) -> list[int]:
    return [frame for frame in range(first.shape[0]) if not torch.equal(first[frame], second[frame])]


# Load SMP


def test_load_says_which_of_the_two_it_is(models: Path) -> None:
    summary = StoryLoadSMP.execute(smp="interpolation (spherical)", ip_adapter=BASE.file_name).args[1]
    assert summary.startswith("No trained SMP: spherical interpolation")
    assert BASE.file_name in summary
    trained = StoryLoadSMP.execute(smp="trained.safetensors", ip_adapter="none").args[1]
    assert trained.startswith("Trained SMP: 'trained.safetensors'")


def test_load_lists_files_of_both_folders(models: Path) -> None:
    (models / "smp" / "notes.txt").write_text("not a model", encoding="utf-8")
    options = {entry.id: entry.options for entry in StoryLoadSMP.define_schema().inputs}
    assert options["smp"] == [LINEAR, "interpolation (spherical)", "trained.safetensors"]
    assert {"none", BASE.file_name, PLUS.file_name} <= set(options["ip_adapter"])


def test_registering_a_folder_keeps_what_another_pack_registered(tmp_path: Path) -> None:
    folder_paths.folder_names_and_paths["smp_test"] = ([str(tmp_path)], {".pt"})
    register_model_folder("smp_test", {".bin"})
    paths, extensions = folder_paths.folder_names_and_paths.pop("smp_test")
    assert str(tmp_path) in paths
    assert extensions == {".pt", ".bin"}


def test_load_refuses_choices_that_contradict_each_other(models: Path) -> None:
    with pytest.raises(ValueError, match="choose IP-Adapter weights"):
        load(LINEAR, "none")
    with pytest.raises(ValueError, match="ip_adapter must be 'none'; it is"):
        load("trained.safetensors", BASE.file_name)
    save_file({"x": torch.zeros(1)}, models / "ipadapter" / "lora.safetensors")
    with pytest.raises(ValueError, match=r"'lora.safetensors' cannot be used by Load SMP. This is not an IP"):
        load(LINEAR, "lora.safetensors")


def test_loaded_weights_are_the_hosts_to_manage(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    smp, embeds = base
    patched = apply(apply(model, smp, embeds), smp, embeds)
    assert [extra.model for extra in patched.get_additional_models()] == [smp.added_kv.model]
    assert not model.get_additional_models()
    sample(patched)
    assert any(entry.model.is_clone(smp.added_kv) for entry in comfy.model_management.current_loaded_models)
    copy = smp.added_kv.deepclone_multigpu()
    assert copy.model is not smp.added_kv.model
    for name, tensor in smp.added_kv.model.state_dict().items():
        assert torch.equal(copy.model.state_dict()[name], tensor)


# Semantic Motion Predictor


def test_three_panels_make_two_transitions_that_meet(models: Path, clip_vision: Any) -> None:
    smp = load(LINEAR, PLUS.file_name)
    embeds, summary = StorySemanticMotionPredictor.execute(clip_vision, smp, panels(3), 5).args
    assert embeds.tokens.shape == (2, 5, 16, 768)
    assert embeds.uncond.shape == (16, 768)
    assert torch.equal(embeds.tokens[0, -1], embeds.tokens[1, 0])
    assert summary == smp.summary + "\nTransitions: 2, of 5 frames; 16 tokens of width 768 a frame."
    torch.testing.assert_close(embeds.tokens[0, 2], (embeds.tokens[0, 0] + embeds.tokens[0, 4]) / 2)


def test_ends_are_what_ip_adapter_sees_of_the_panels(base: tuple[LoadedSMP, SMPEmbeds], clip_vision: Any) -> None:
    smp, embeds = base
    square = panels(2)[:, :, 10:50]
    embedding = clip_vision.encode_image(square)["image_embeds"].float()
    expected = smp.motion.model.projection(embedding[:, None])
    torch.testing.assert_close(embeds.tokens[0, [0, -1]], expected)
    torch.testing.assert_close(embeds.uncond, smp.motion.model.projection(torch.zeros(1, 1, 1024))[0])


def test_plus_uncond_is_a_blank_image_encoded(models: Path, clip_vision: Any) -> None:
    smp = load(LINEAR, PLUS.file_name)
    embeds = predict(clip_vision, smp)
    pixels = torch.zeros(1, 3, clip_vision.image_size, clip_vision.image_size)
    states = clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1].float()
    expected = smp.motion.model.resampler(states)[0]
    torch.testing.assert_close(embeds.uncond, expected)
    assert (embeds.uncond - embeds.tokens[0, 0]).abs().max() > 0.1


def test_a_trained_smp_predicts_and_says_when_it_goes_beyond_its_training(models: Path, clip_vision: Any) -> None:
    smp = load("trained.safetensors", "none")
    within = StorySemanticMotionPredictor.execute(clip_vision, smp, panels(2), 3).args
    beyond = StorySemanticMotionPredictor.execute(clip_vision, smp, panels(2), 7).args
    assert within[0].tokens.shape == (1, 3, 2, 768)
    assert beyond[0].tokens.shape == (1, 7, 2, 768)
    assert "trained on up to 3 frames" not in within[1]
    assert "trained on up to 3 frames: 7 sample the same motion more finely" in beyond[1]
    with pytest.raises(AssertionError):  # it is not the interpolation
        torch.testing.assert_close(within[0].tokens[0, 1], within[0].tokens[0, [0, 2]].mean(dim=0))


def test_prediction_is_deterministic(base: tuple[LoadedSMP, SMPEmbeds], clip_vision: Any) -> None:
    smp, embeds = base
    assert torch.equal(predict(clip_vision, smp).tokens, embeds.tokens)


def test_one_panel_and_a_wrong_encoder_are_refused(models: Path, clip_vision: Any) -> None:
    smp, plus = load(LINEAR, BASE.file_name), load(LINEAR, PLUS.file_name)
    with pytest.raises(ValueError, match="images holds 1 panel; a transition needs two"):
        StorySemanticMotionPredictor.execute(clip_vision, smp, panels(1), FRAMES)
    vit_l = tiny_clip_vision(embed_width=768, width=1024)
    with pytest.raises(ValueError, match="gives image embeddings of width 768, but this SMP reads width 1024"):
        predict(vit_l, smp)
    with pytest.raises(ValueError, match="gives hidden states of width 1024, but this SMP reads width 1280"):
        predict(vit_l, plus)


# Apply SMP Guidance


@pytest.mark.parametrize("guidance", ["concat", "decoupled"])
def test_strength_zero_is_the_stock_model_bit_for_bit(
    base: tuple[LoadedSMP, SMPEmbeds], model: Any, guidance: str
) -> None:
    stock = sample(model)
    assert torch.equal(sample(apply(model, *base, strength=0.0, guidance=guidance)), stock)
    assert changed_frames(sample(apply(model, *base, guidance=guidance)), stock) == list(range(FRAMES))
    assert torch.equal(sample(model), stock)


def test_patches_that_do_nothing_leave_the_numbers_alone(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    smp, embeds = base
    guide = smp_patch.SMPGuide(embeds.tokens[0], embeds.uncond, smp.added_kv, "decoupled", 0.0, frozenset())
    patched = apply(model, smp, embeds)
    replace_guides(patched, guide)
    assert torch.equal(sample(patched), sample(model))


def test_a_single_cross_attention_replaced_behind_is_refused(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    patched = apply(model, *base)
    patched.set_model_attn2_replace(lambda q, k, v, extra: attention_of_call(extra)(q, k, v, None), "output", 5, 0)
    with pytest.raises(ValueError, match=r"has replaced 1 of the model's 16 .*\('output', 5\)\), and the motion"):
        sample(patched)


def test_a_replacement_behind_that_asks_ours_is_fine(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    patched = apply(model, *base)
    guided = sample(patched)
    ours = patched.model_options["transformer_options"]["patches_replace"]["attn2"]["output", 5, 0]
    patched.set_model_attn2_replace(lambda q, k, v, extra: ours(q, k, v, extra), "output", 5, 0)
    assert torch.equal(sample(patched), guided)


def test_weights_of_motion_tokens_are_not_swallowed(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    weak = apply(model, *base, strength=0.1, guidance="concat")
    drawn = sample(weak)

    def swallowing_masks(function: Callable[..., Any], *args: Any, mask: Any = None, **options: Any) -> Any:
        return function(*args, mask=None, **options)

    weak.model_options["transformer_options"]["optimized_attention_override"] = swallowing_masks
    assert torch.equal(sample(weak), drawn)


def test_padded_prompts_are_for_decoupled_guidance(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    """Beside them one softmax over text and motion would count the padding; a second attention doesn't see it."""
    lengths = [77 * chunks for chunks in (3, 4, 5, 7)]
    states = torch.cat([F.pad(text(3, 7)[0][0][:, :length], (0, 0, 0, 7 * 77 - length)) for length in lengths])
    padded: Conditioning = [[states, {LENGTHS_KEY: lengths}]]
    leave_out_padding(padded)
    with pytest.raises(ValueError, match=r"SMP guidance by concat .* set guidance to decoupled"):
        sample(apply(model, *base, guidance="concat"), positive=padded)
    drawn = sample(apply(model, *base, guidance="decoupled"), positive=padded)
    alone: Conditioning = [[states[:1, : lengths[0]], {}]]  # what the first frame's own text makes of all frames
    expected = sample(apply(model, *base, guidance="decoupled"), positive=alone)
    torch.testing.assert_close(drawn[0], expected[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(drawn[1:], expected[1:], atol=1e-3)


def test_a_guider_without_a_positive_prompt_is_refused(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    guider = comfy.samplers.CFGGuider(apply(model, *base))
    guider.inner_set_conds({"first": text(1), "second": text(2)})
    noise = torch.zeros(FRAMES, 4, 8, 8)
    sigmas = torch.tensor([10.0, 0.0])
    with pytest.raises(ValueError, match=r"this run \(CFGGuider\) has none of that name, but first, second"):
        guider.sample(noise, noise, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)


def replace_guides(patched: Any, guide: smp_patch.SMPGuide) -> None:
    """Put another guide in place of the one that Apply SMP Guidance attached."""
    patches = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    for key, patch in patches.items():
        patches[key] = dataclasses.replace(patch, guide=guide)
    wrappers = comfy.patcher_extension.WrappersMP
    for kind, wrapper in ((wrappers.APPLY_MODEL, guide.lay_out_tokens), (wrappers.OUTER_SAMPLE, guide.begin_run)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)


def test_all_16_cross_attentions_are_guided(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    smp, embeds = base
    seen: list[tuple[Any, ...]] = []
    patched = apply(model, smp, embeds)
    patches = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    for key, patch in list(patches.items()):

        def watched(q: Tensor, k: Tensor, v: Tensor, extra: Any, patch: Any = patch) -> Tensor:
            out = patch(q, k, v, extra)
            site = smp.config.sites[patch.position]
            assert q.shape[-1] == site.channels
            assert not torch.equal(out, attention_of_call(extra)(q, k, v, None))
            seen.append((*extra["block"], extra["block_index"]))
            return out

        patches[key] = watched
    sample(patched, cfg=1.0)
    assert sorted(seen) == sorted(SITE_KEYS)


@pytest.mark.parametrize("guidance", ["concat", "decoupled"])
def test_a_frame_follows_its_own_tokens_and_no_others(
    base: tuple[LoadedSMP, SMPEmbeds], model: Any, guidance: str
) -> None:
    smp, embeds = base
    before = sample(apply(model, smp, embeds, guidance=guidance))
    for frame in range(FRAMES):
        tokens = embeds.tokens.clone()
        tokens[0, frame] += 1
        after = sample(apply(model, smp, dataclasses.replace(embeds, tokens=tokens), guidance=guidance))
        assert changed_frames(before, after) == [frame]


def test_cond_and_uncond_get_their_own_tokens(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    smp, embeds = base
    other_uncond = dataclasses.replace(embeds, uncond=embeds.uncond + 1)
    calls: list[list[int]] = []

    def results(embeds: SMPEmbeds, negative: Conditioning | None = None) -> tuple[Tensor, Tensor]:
        found = {}
        patched = apply(model, smp, embeds)

        def post_cfg(args: dict[str, Any]) -> Tensor:
            found["cond"], found["uncond"] = args["cond_denoised"], args["uncond_denoised"]
            return args["denoised"]

        def watch(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(args[5]["cond_or_uncond"])
            return executor(*args, **kwargs)

        patched.set_model_sampler_post_cfg_function(post_cfg)
        patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "watch", watch)
        sample(patched, negative=negative)
        return found["cond"], found["uncond"]

    cond, uncond = results(embeds)
    same_cond, changed_uncond = results(other_uncond)
    assert torch.equal(cond, same_cond)
    assert changed_frames(uncond, changed_uncond) == list(range(FRAMES))
    # A negative that is too long to join runs as a call of its own; a combined one as two chunks.
    long_cond, _ = results(embeds, text(3, chunks=5))
    assert_same_clip(long_cond, cond)
    combined_cond, _ = results(embeds, [*text(2), *text(3)])
    assert_same_clip(combined_cond, cond)
    assert [sorted(call) for call in calls] == [[0, 1], [0, 1], [0], [1], [0, 1, 1]]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_concat_does_not_depend_on_the_length_of_the_negative(
    models: Path, clip_vision: Any, model: Any, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    smp = load("trained.safetensors", "none")
    patched = apply(model, smp, predict(clip_vision, smp), strength=strength)
    conds: list[Tensor] = []

    def post_cfg(args: dict[str, Any]) -> Tensor:
        conds.append(args["cond_denoised"])
        return args["denoised"]

    patched.set_model_sampler_post_cfg_function(post_cfg)
    sample(patched)
    sample(patched, negative=text(3, chunks=2))  # the host repeats the positive to join them
    monkeypatch.setattr(smp_patch, "count_text_repeats", lambda context: None)
    sample(patched, negative=text(3, chunks=2))
    alone, padded, trap = conds
    assert_same_clip(padded, alone)
    assert (trap - alone).abs().max() > 10 * (padded - alone).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("causal_window_fix", [False, True])
def test_windows_over_the_batch_give_each_frame_its_tokens(
    models: Path, clip_vision: Any, model: Any, causal_window_fix: bool
) -> None:
    smp = load(LINEAR, BASE.file_name)
    patched = apply(model, smp, predict(clip_vision, smp, frames=9))
    whole = sample(patched, frames=9)
    windowed = patched.clone()
    windowed.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_uniform"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=4,
        context_overlap=1,
        context_stride=2,
        closed_loop=False,
        dim=0,
        causal_window_fix=causal_window_fix,
    )
    # Without a motion module frames are independent, so windows change nothing but rounding.
    assert_same_clip(sample(windowed, frames=9), whole)


def test_animatediff_evolved_windows_are_honoured(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    smp, embeds = base
    guide = smp_patch.SMPGuide(embeds.tokens[0], embeds.uncond, smp.added_kv, "decoupled", 1.0, frozenset())
    options = {
        "cond_or_uncond": [1, 0],
        "uuids": ["negative", "positive"],
        "ad_params": {"sub_idxs": [3, 1], "full_length": FRAMES},
        smp_patch.POSITIVE_KEY: {"positive"},
    }
    found: dict[Any, Any] = {}

    class Unet:
        class_obj = SimpleNamespace(current_patcher=apply(model, smp, embeds))

        def __call__(self, x: Tensor, t: Tensor, concat: Any, text: Any, control: Any, options: Any) -> Tensor:
            found.update(options)
            return x

    guide.lay_out_tokens(Unet(), torch.zeros(4, 4, 8, 8), torch.zeros(4), None, torch.zeros(4, 77, 768), None, options)
    assert torch.equal(found[KEY][guide].tokens[2:], embeds.tokens[0][[3, 1]])
    assert torch.equal(found[KEY][guide].tokens[0], embeds.uncond)
    assert KEY not in options


def test_pair_index_picks_the_transition(models: Path, clip_vision: Any, model: Any) -> None:
    smp = load(LINEAR, BASE.file_name)
    embeds = predict(clip_vision, smp, count=3)
    second = dataclasses.replace(embeds, tokens=embeds.tokens[1:])
    assert torch.equal(sample(apply(model, smp, embeds, pair_index=1)), sample(apply(model, smp, second)))
    assert not torch.equal(sample(apply(model, smp, embeds)), sample(apply(model, smp, second)))


@pytest.mark.parametrize("guidance", ["concat", "decoupled"])
@pytest.mark.parametrize("with_index", [False, True])
def test_an_earlier_replacement_goes_on_working(
    base: tuple[LoadedSMP, SMPEmbeds], model: Any, guidance: str, with_index: bool
) -> None:
    class Earlier:
        """A replacement of another pack: attention without its strongest effect, and what the host asks of
        it."""

        def __init__(self) -> None:
            self.moved = self.cleaned = False

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            return 0.5 * attention_of_call(extra)(q, k, v, None)

        def to(self, device_or_dtype: Any) -> Earlier:
            self.moved = True
            return self

        def models(self) -> list[Any]:
            return [base[0].motion]

        def cleanup(self) -> None:
            self.cleaned = True

    earlier = Earlier()
    owned = model.clone()
    owned.set_model_attn2_replace(earlier, "middle", 0, 0 if with_index else None)
    patched = apply(owned, *base, guidance=guidance)
    assert base[0].motion in patched.model_patches_models()
    q, k, v = (torch.randn(2 * FRAMES, length, 128) for length in (6, 77, 77))
    patch = patched.model_options["transformer_options"]["patches_replace"]["attn2"][("middle", 0, 0)]
    tokens = smp_patch.CallTokens(torch.randn(2 * FRAMES, 4, 768), None, base[0].added_kv.model)
    extra = {"n_heads": 8, "attn_precision": None, "block": ("middle", 0), KEY: {patch.guide: tokens}}
    alone = dataclasses.replace(patch, previous=None)(q, k, v, extra)
    plain = attention_of_call(extra)(q, k, v, None)
    torch.testing.assert_close(patch(q, k, v, extra), 0.5 * plain + (alone - plain), atol=1e-5, rtol=1e-5)
    sample(patched)
    assert earlier.moved
    assert earlier.cleaned


def test_two_transitions_chain_in_either_order(models: Path, clip_vision: Any, model: Any) -> None:
    linear, plus = load(LINEAR, BASE.file_name), load(LINEAR, PLUS.file_name)
    first, second = (linear, predict(clip_vision, linear)), (plus, predict(clip_vision, plus))
    one_way = sample(apply(apply(model, *first), *second))
    other_way = sample(apply(apply(model, *second), *first))
    assert_same_clip(one_way, other_way)
    assert not torch.equal(one_way, sample(apply(model, *first)))
    assert not torch.equal(one_way, sample(apply(model, *second)))


def test_runs_leave_nothing_behind(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    patched = apply(model, *base)
    first = sample(patched)
    assert KEY not in patched.model_options["transformer_options"]
    assert torch.equal(sample(patched), first)


def test_half_precision_runs(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    smp, embeds = base
    q, k, v = (torch.randn(2, length, 128).half() for length in (6, 77, 77))
    patch = smp_patch.SMPCrossAttention(
        smp_patch.SMPGuide(embeds.tokens[0], embeds.uncond, smp.added_kv, "concat", 0.5, frozenset()), 15
    )
    tokens = smp_patch.CallTokens(embeds.tokens[0, :2], [1, 1], smp.added_kv.model)
    extra = {"n_heads": 8, "attn_precision": None, "block": ("middle", 0), KEY: {patch.guide: tokens}}
    half = patch(q, k, v, extra)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), patch(q.float(), k.float(), v.float(), extra), atol=5e-3, rtol=5e-3)


def tiny_sdxl() -> Any:
    unet = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "context_dim": 2048,
        "num_head_channels": 32,
        "num_heads": -1,
        "use_linear_in_transformer": True,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [0, 2],
        "transformer_depth_output": [0, 0, 2, 2],
        "transformer_depth_middle": 2,
    }
    return in_patcher(comfy.supported_models.SDXL(unet))


def in_patcher(config: Any) -> Any:
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(config.get_model({}, device=cpu), cpu, cpu)


def tiny_flux() -> Any:
    dit = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "context_in_dim": 32,
        "vec_in_dim": 16,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": False,
        "txt_ids_dims": [],
    }
    return in_patcher(comfy.supported_models.FluxSchnell(dit))


def other_widths() -> Any:
    return seeded_sd15({**SMALL_UNET, "channel_mult": [1, 2, 2, 2]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_sdxl, r"SDXL\): it has 8 cross-attentions, the SMP has projections for 16"),
        (tiny_flux, r"needs an SD1.5 model; this one is a Flux \(Flux\)"),
        (other_widths, r"UNet block \('input', 7, 0\): 64 channels in the model, 128 in the SMP"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    base: tuple[LoadedSMP, SMPEmbeds], make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apply(make(), *base)


def test_embeds_and_latents_that_do_not_fit_are_refused(
    base: tuple[LoadedSMP, SMPEmbeds], models: Path, model: Any
) -> None:
    smp, embeds = base
    plus = load(LINEAR, PLUS.file_name)
    with pytest.raises(ValueError, match=r"image_embeds tokens \(4 x 768\) .* resampled tokens \(16 x 768"):
        apply(model, plus, embeds)
    with pytest.raises(ValueError, match="pair_index is 1; smp_embeds holds 1 transitions, 0 to 0"):
        apply(model, smp, embeds, pair_index=1)
    with pytest.raises(ValueError, match="latent batch has 6 frames, but smp_embeds holds 4"):
        sample(apply(model, smp, embeds), frames=6)


def test_a_guider_that_puts_the_negative_first_is_refused(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    guider = Guider_DualCFG(apply(model, *base))
    guider.set_conds(text(1), text(2), text(3))
    guider.set_cfg(4.0, 4.0)
    noise = torch.zeros(FRAMES, 4, 8, 8)
    with pytest.raises(ValueError, match="does not work with DualCFGGuider"):
        guider.sample(noise, noise, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]))


@pytest.mark.slow
def test_a_negative_prompt_asked_for_by_itself_gets_no_motion(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    """Self-Attention Guidance and Dual Model CFG Guider do so; the prompt is then the first of its call."""
    smp, embeds = base
    louder = dataclasses.replace(embeds, tokens=embeds.tokens * 4)

    def answers(embeds: SMPEmbeds) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        patched = apply(model, smp, embeds)

        def ask(args: dict[str, Any]) -> Tensor:
            for name in ("cond", "uncond"):
                (found[name],) = comfy.samplers.calc_cond_batch(
                    args["model"], [args[name]], args["input"], args["sigma"], args["model_options"]
                )
            return args["denoised"]

        patched.set_model_sampler_post_cfg_function(ask)
        sample(patched)
        return found

    one, other = answers(embeds), answers(louder)
    assert torch.equal(one["uncond"], other["uncond"])
    assert changed_frames(one["cond"], other["cond"]) == [*range(FRAMES)]

    noise = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(9))

    def guided(guider: Any) -> Tensor:
        guider.set_conds(text(1), text(2))
        guider.set_cfg(4.0)
        steps = comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 0.0])
        return guider.sample(noise, torch.zeros_like(noise), *steps, seed=0)

    patched = apply(model, smp, embeds)
    expected = guided(comfy.samplers.CFGGuider(patched))
    assert_same_clip(guided(Guider_DualModel(patched, patched.clone())), expected)
    assert not torch.allclose(guided(comfy.samplers.CFGGuider(model)), expected, rtol=1e-3)


def test_a_later_replacement_of_whole_blocks_is_refused(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    """As IP-Adapter packs set it for SD1.5: by block, without the layer's number."""

    def image_prompt(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        return attention_of_call(extra)(q, k, v, None) + 1

    before = model.clone()
    before.set_model_attn2_replace(image_prompt, "input", 1)
    sample(apply(before, *base))
    behind = apply(model, *base)
    behind.set_model_attn2_replace(image_prompt, "input", 1)
    with pytest.raises(ValueError, match=r"behind Apply SMP Guidance .* \(UNet block \('input', 1\)\)"):
        sample(behind)


def test_a_clone_for_another_device_uses_its_own_projections(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    patched = apply(model, *base)
    clone = patched.clone()
    (added,) = clone.get_additional_models_with_key(KEY)
    own = added.deepclone_multigpu()
    clone.set_additional_models(KEY, [own])
    first = sample(patched)
    assert torch.equal(sample(clone), first)
    for parameter in own.model.parameters():
        parameter.data.mul_(3)
    assert not torch.allclose(sample(clone), first, rtol=1e-3)
    assert torch.equal(sample(patched), first)


def test_sd2_is_refused(base: tuple[LoadedSMP, SMPEmbeds]) -> None:
    sd2 = seeded_sd15({**SMALL_UNET, "context_dim": 1024})
    sd2.model.model_config = comfy.supported_models.SD20({**SMALL_UNET, "context_dim": 1024})
    with pytest.raises(ValueError, match=r"needs an SD1.5 model; this one is an SD2"):
        apply(sd2, *base)


def test_files_that_cannot_be_read_are_named(models: Path) -> None:
    for name in ("cut.safetensors", "cut.bin"):
        (models / "ipadapter" / name).write_bytes(b"\x80\x04no weights at all")
        with pytest.raises(ValueError, match=rf"{name} can't be read as a file of weights. It may be damaged"):
            load(LINEAR, name)


def test_the_encoder_that_an_smp_needs_is_named(models: Path, clip_vision: Any) -> None:
    smp = load(LINEAR, BASE.file_name)
    for width, advice in ((1280, "CLIP-ViT-bigG-14"), (1000, "the one that it was trained with")):
        projection = dataclasses.replace(smp.config.projection, embed_width=width)
        config = dataclasses.replace(smp.config, encoder_width=width, projection=projection)
        other = dataclasses.replace(smp, config=config)
        with pytest.raises(ValueError, match=f"reads width {width}. Load {advice}"):
            predict(clip_vision, other)


def test_a_tiled_batch_is_refused(base: tuple[LoadedSMP, SMPEmbeds], model: Any) -> None:
    patched = apply(model, *base)

    def tile(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return n.repeat(2, 1, 1), context.repeat(2, 1, 1), value.repeat(2, 1, 1)

    patched.set_model_attn2_patch(tile)
    with pytest.raises(ValueError, match=r"tokens for 8 rows, but UNet block .* was handed 16"):
        sample(patched)
