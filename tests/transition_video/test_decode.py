"""SMP Video Decode on the host's sampler, with a small SD1.5, motion module, VAE and IP-Adapter."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import latent_preview
import nodes
import numpy as np
import pytest
import torch
from comfy.cli_args import args
from safetensors.torch import save_file
from storydiffusion.devtools.tiny.motion import SD15_LAYOUT, motion_config, motion_tensors, seeded_sd15
from storydiffusion.devtools.tiny.seeded_weights import parameter_shapes, seeded_state_dict
from storydiffusion.devtools.tiny.smp import SeededIPAdapter, ip_adapter_tensors
from storydiffusion.nodes.animatediff.loader import load_motion_module
from storydiffusion.nodes.animatediff.nodes import StoryApplyMotionModule
from storydiffusion.nodes.motion_predictor.loading import LoadedSMP, load_smp
from storydiffusion.nodes.motion_predictor.nodes import StoryApplySMP
from storydiffusion.nodes.motion_predictor.predict import SMPEmbeds, predict_motion
from storydiffusion.nodes.prompts.batching import stack_conditioning
from storydiffusion.nodes.transition_video.nodes import StorySMPVideoDecode
from storydiffusion.smp.ip_adapter import load_ip_adapter
from torch import Tensor

FRAMES = 5
PANELS = 3
SIZE = 64
STEPS = 3
SMALL_UNET = {**SD15_LAYOUT, "model_channels": 32, "channel_mult": [1, 1, 2, 2]}
CHANNELS = (32, 32, 32, 32, 64, 64, 64, 64, 64, 32, 32, 32, 32, 32, 32, 64)
WIDTHS = (32, 32, 64, 64)

Conditioning = list[list[Any]]


class WatchedVAE:
    """A real VAE; `decoded` are the latents it was given, `at_decode` is called before each decoding."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.decoded: list[Tensor] = []
        self.at_decode: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents)
        for action in self.at_decode:
            action()
        return self.vae.decode(latents)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """The host runs nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return seeded_sd15(SMALL_UNET)


@pytest.fixture(scope="module")
def seeded_vae() -> Any:
    weights = seeded_state_dict(parameter_shapes(comfy.taesd.taesd.TAESD()), 0, torch.float32)
    return comfy.sd.VAE(sd={**weights, "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)})


@pytest.fixture
def vae(seeded_vae: Any) -> WatchedVAE:
    return WatchedVAE(seeded_vae)


@pytest.fixture(scope="module")
def motion_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("motion") / "motion.safetensors"
    save_file(motion_tensors(motion_config(WIDTHS)), path)
    return load_motion_module(str(path))


@pytest.fixture(scope="module")
def smp() -> LoadedSMP:
    tensors = ip_adapter_tensors(SeededIPAdapter("", plus=False, channels=CHANNELS), torch.float32)
    return load_smp(lambda: load_ip_adapter(tensors, interpolation="linear"), "interpolation")


@pytest.fixture(scope="module")
def embeds(smp: LoadedSMP) -> SMPEmbeds:
    """Motion between three panels."""
    features = torch.randn(PANELS, 1024, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return predict_motion(smp, features, None, FRAMES)


@pytest.fixture(scope="module")
def one_pair(embeds: SMPEmbeds) -> SMPEmbeds:
    return dataclasses.replace(embeds, tokens=embeds.tokens[:1])


def panels(count: int = PANELS, height: int = SIZE, width: int = SIZE) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(0))


def text(seed: int, rows: int = 1) -> Conditioning:
    return [[torch.randn(rows, 77, 768, generator=torch.Generator().manual_seed(seed)), {}]]


def decode(model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: Any, **changes: Any) -> tuple[Tensor, int, float]:
    inputs = {
        "panels": panels(),
        "positive": text(1),
        "negative": text(2),
        "seed": 7,
        "steps": STEPS,
        "cfg": 5.0,
        "sampler_name": "ddim",
        "scheduler": "ddim_uniform",
        "anchor": "off",
        "strength": 1.0,
        "fps": 8.0,
        **changes,
    }
    return StorySMPVideoDecode.execute(model=model, smp=smp, smp_embeds=embeds, vae=vae, **inputs).args


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_defaults_are_the_papers() -> None:
    inputs = {entry.id: entry for entry in StorySMPVideoDecode.define_schema().inputs}
    assert (inputs["steps"].default, inputs["cfg"].default, inputs["sampler_name"].default) == (50, 7.5, "ddim")
    assert inputs["scheduler"].default in inputs["scheduler"].options
    assert inputs["sampler_name"].default in inputs["sampler_name"].options
    assert inputs["anchor"].default in inputs["anchor"].options


@pytest.mark.slow
def test_it_is_apply_smp_and_ksampler_for_each_pair(
    model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE, motion_module: Any
) -> None:
    """Three panels give 2F - 1 frames: those of the stock sampler, the shared one once."""
    before = str(model.model_options)
    frames, count, fps = decode(model, smp, embeds, vae, motion_module=motion_module, anchor="off", fps=12.0)
    assert count == len(frames) == 2 * FRAMES - 1
    assert frames.shape[1:] == (SIZE, SIZE, 3)
    assert fps == 12.0
    assert str(model.model_options) == before
    moving = StoryApplyMotionModule.execute(model, motion_module).args[0]
    empty = {"samples": torch.zeros(FRAMES, 4, SIZE // 8, SIZE // 8)}
    clips = []
    for pair in range(2):
        guided = StoryApplySMP.execute(moving, smp, embeds, pair, 1.0, "as trained").args[0]
        settings = (STEPS, 5.0, "ddim", "ddim_uniform")
        (latent,) = nodes.common_ksampler(guided, 7 + pair, *settings, text(1), text(2), empty)
        assert torch.equal(vae.decoded[pair], latent["samples"])  # F rows at once, never more
        clips.append(vae.vae.decode(latent["samples"]))
    assert len(vae.decoded) == 2
    assert torch.equal(frames, torch.cat([clips[0][:-1], clips[1]]))
    # The same with the motion module on the model already.
    assert torch.equal(decode(moving, smp, embeds, vae)[0], frames)
    assert not torch.equal(decode(model, smp, embeds, vae)[0], frames)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("anchor", "sampler"),
    [("hold", "ddim"), ("hold", "euler_ancestral"), ("hold", "uni_pc"), ("hold, soft neighbours", "ddim")],
)
def test_held_ends_are_the_panels_latents(
    model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE, motion_module: Any, anchor: str, sampler: str
) -> None:
    frames, _, _ = decode(*(model, smp, embeds, vae), anchor=anchor, motion_module=motion_module, sampler_name=sampler)
    latents = vae.encode(panels())
    for pair in range(2):
        clip = vae.decoded[pair]
        assert torch.equal(clip[0], latents[pair])
        assert torch.equal(clip[-1], latents[pair + 1])
        for frame in range(1, FRAMES - 1):
            assert relative_error(clip[frame], latents[pair]) > 0.1
            assert relative_error(clip[frame], latents[pair + 1]) > 0.1
    shown = vae.vae.decode(latents)
    for panel in range(PANELS):
        assert (frames[panel * (FRAMES - 1)] - shown[panel]).abs().max() <= 1e-3


@pytest.mark.slow
def test_free_frames_see_held_panels_at_their_own_noise_level(
    model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE
) -> None:
    """What the UNet is given in held frames is panel + sigma * noise: the same noise at every step."""
    seen: list[tuple[float, Tensor]] = []

    def watch(apply_model: Any, call: dict[str, Any]) -> Tensor:
        seen.append((float(call["timestep"][0]), call["input"][:FRAMES]))
        return apply_model(call["input"], call["timestep"], **call["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(watch)
    decode(watched, smp, embeds, vae, anchor="hold", cfg=1.0)
    latents = model.model.process_latent_in(vae.encode(panels()))
    assert len(seen) == 2 * STEPS
    for pair in range(2):
        calls = seen[pair * STEPS :][:STEPS]
        for row, panel in ((0, pair), (-1, pair + 1)):
            noises = [(x[row] - latents[panel]) / sigma for sigma, x in calls]
            assert 0.7 < noises[0].std() < 1.3
            for noise in noises[1:]:
                torch.testing.assert_close(noise, noises[0], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_each_anchor_ties_the_ends_less(
    model: Any, smp: LoadedSMP, one_pair: SMPEmbeds, vae: WatchedVAE, motion_module: Any
) -> None:
    anchors = ("hold, soft neighbours", "release late", "off")
    for anchor in anchors:
        decode(model, smp, one_pair, vae, anchor=anchor, panels=panels(2), motion_module=motion_module, steps=5)
    panel = vae.encode(panels(2))[0]
    errors = [relative_error(clip[0], panel) for clip in vae.decoded]
    assert errors[0] == 0 < errors[1] < errors[2]


@pytest.mark.slow
def test_soft_neighbours_stay_nearer_to_the_panel(
    model: Any, smp: LoadedSMP, one_pair: SMPEmbeds, vae: WatchedVAE
) -> None:
    """Without a motion module frames are independent: only the neighbours of the ends change."""
    for anchor in ("hold", "hold, soft neighbours"):
        decode(model, smp, one_pair, vae, anchor=anchor, panels=panels(2), steps=5)
    hard, soft = vae.decoded
    first, last = vae.encode(panels(2))
    assert relative_error(soft[1], first) < relative_error(hard[1], first)
    assert relative_error(soft[-2], last) < relative_error(hard[-2], last)
    assert torch.equal(soft[2], hard[2])  # the middle of five belongs to neither panel


@pytest.mark.slow
def test_one_row_of_text_for_each_transition(model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE) -> None:
    rows = stack_conditioning([text(11), text(12)])
    both, _, _ = decode(model, smp, embeds, vae, positive=rows)
    first, _, _ = decode(model, smp, embeds, vae, positive=text(11))
    second, _, _ = decode(model, smp, embeds, vae, positive=text(12))
    assert torch.equal(both[: FRAMES - 1], first[: FRAMES - 1])
    assert torch.equal(both[FRAMES - 1 :], second[FRAMES - 1 :])
    assert not torch.equal(first, second)
    negative, _, _ = decode(model, smp, embeds, vae, negative=stack_conditioning([text(2), text(11)]))
    stock, _, _ = decode(model, smp, embeds, vae)
    assert torch.equal(negative[: FRAMES - 1], stock[: FRAMES - 1])
    assert not torch.equal(negative[FRAMES - 1 :], stock[FRAMES - 1 :])


@pytest.mark.slow
def test_one_row_of_text_for_each_panel_moves_evenly(
    model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE
) -> None:
    """Without a motion module frames are independent, so each equals its frame in a run with its text alone."""
    rows = stack_conditioning([text(11), text(12), text(13)])
    frames, _, _ = decode(model, smp, embeds, vae, positive=rows)
    halfway = [[(text(12)[0][0] + text(13)[0][0]) / 2, {}]]
    for number, alone in ((0, text(11)), (FRAMES - 1, text(12)), (FRAMES + 1, halfway), (2 * FRAMES - 2, text(13))):
        expected, _, _ = decode(model, smp, embeds, vae, positive=alone)
        assert (frames[number] - expected[number]).abs().max() <= 1e-4
    assert (frames[1] - expected[1]).abs().max() > 1e-2


@pytest.mark.slow
def test_strength_zero_leaves_the_motion_tokens_out(
    model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE
) -> None:
    other = dataclasses.replace(embeds, tokens=embeds.tokens.flip(1))
    assert torch.equal(
        decode(model, smp, embeds, vae, strength=0.0)[0], decode(model, smp, other, vae, strength=0.0)[0]
    )
    assert not torch.equal(decode(model, smp, embeds, vae)[0], decode(model, smp, other, vae)[0])


@pytest.mark.slow
def test_progress_counts_steps_over_all_pairs(model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE) -> None:
    reported: list[tuple[int, int]] = []
    with progress_hook(lambda value, total: reported.append((value, total))):
        decode(model, smp, embeds, vae)
    assert reported[0] == (1, 2 * STEPS)
    assert reported[-1] == (2 * STEPS, 2 * STEPS)
    assert reported == sorted(set(reported))


@pytest.mark.slow
def test_the_preview_shows_all_frames(model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE) -> None:
    """A held first frame never changes; the others do from step to step."""
    seen: list[np.ndarray] = []
    args.preview_method = latent_preview.LatentPreviewMethod.Latent2RGB
    earlier = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id: seen.append(np.asarray(preview[1])))
    try:
        decode(model, smp, embeds, vae, anchor="hold")
    finally:
        comfy.utils.set_progress_bar_global_hook(earlier)
        args.preview_method = latent_preview.LatentPreviewMethod.NoPreviews
    assert len(seen) == 2 * STEPS
    assert seen[0].size > 3 * (SIZE // 8) ** 2  # more than one frame
    assert not np.array_equal(seen[0], seen[1])


@pytest.mark.slow
def test_without_any_motion_module_the_log_says_so(
    model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE, motion_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    decode(model, smp, embeds, vae, motion_module=motion_module)
    decode(StoryApplyMotionModule.execute(model, motion_module).args[0], smp, embeds, vae)
    assert not warnings
    decode(model, smp, embeds, vae)
    assert "each frame will be a picture of its own" in warnings[0]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_the_last_seeds(model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE, sampler: str) -> None:
    """After the greatest comes 0."""
    (seed,) = [entry for entry in StorySMPVideoDecode.define_schema().inputs if entry.id == "seed"]
    last = decode(model, smp, embeds, vae, anchor="hold", seed=seed.max, sampler_name=sampler)[0]
    one = dataclasses.replace(embeds, tokens=embeds.tokens[1:])
    second = decode(model, smp, one, vae, anchor="hold", seed=0, sampler_name=sampler, panels=panels()[1:])[0]
    assert relative_error(last[FRAMES - 1 :], second) < 1e-3


class progress_hook:  # noqa: N801
    """The host's hook for progress bars, as its server sets it, for a while."""

    def __init__(self, report: Any) -> None:
        self.report = report

    def __enter__(self) -> None:
        self.earlier = comfy.utils.PROGRESS_BAR_HOOK
        comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id: self.report(value, total))

    def __exit__(self, *_: object) -> None:
        comfy.utils.set_progress_bar_global_hook(self.earlier)


@pytest.mark.slow
def test_cancel_within_a_transition(model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE) -> None:
    reported: list[int] = []

    def cancel(value: int, total: int) -> None:
        reported.append(value)
        comfy.model_management.interrupt_current_processing(True)

    with progress_hook(cancel), pytest.raises(comfy.model_management.InterruptProcessingException):
        decode(model, smp, embeds, vae)
    assert reported == [1]
    assert not vae.decoded
    assert len(decode(model, smp, embeds, vae)[0]) == 2 * FRAMES - 1  # the next run starts afresh


def test_cancel_between_transitions(model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE) -> None:
    vae.at_decode.append(lambda: comfy.model_management.interrupt_current_processing(True))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        decode(model, smp, embeds, vae)
    assert len(vae.decoded) == 1


def small_sdxl() -> Any:
    unet = {
        **SMALL_UNET,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [0, 2],
        "transformer_depth_output": [0, 0, 2, 2],
        "transformer_depth_middle": 2,
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "num_heads": -1,
        "num_head_channels": 32,
        "use_linear_in_transformer": True,
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "use_spatial_transformer": True,
        "legacy": False,
    }
    config = comfy.supported_models.SDXL(unet)
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(config.get_model({}, device=cpu), cpu, cpu)


def vae_of_16_channels() -> Any:
    taesd = comfy.taesd.taesd.TAESD(latent_channels=16)
    return comfy.sd.VAE(sd=seeded_state_dict(parameter_shapes(taesd), 0, torch.float32))


def test_inputs_that_do_not_fit_are_refused_before_sampling(
    model: Any, smp: LoadedSMP, embeds: SMPEmbeds, vae: WatchedVAE, motion_module: Any
) -> None:
    def refused(message: str, **changes: Any) -> None:
        inputs = {"model": model, "smp": smp, "embeds": embeds, "vae": vae, "motion_module": motion_module, **changes}
        with pytest.raises(ValueError, match=message):
            decode(**inputs)
        assert not vae.decoded

    refused("panels holds 1 panel; a transition needs two", panels=panels(1))
    refused("panels holds 4 panels, which have 3 transitions between them, but smp_embeds holds 2", panels=panels(4))
    refused(r"panels are 60 x 64 pixels; .* multiples of 8.* to 56 x 64", panels=panels(width=60))
    refused(r"IP-Adapter SD1.5 weights need an SD1.5 checkpoint, not SDXL", model=small_sdxl())
    refused("vae makes latents with 16 channels, but the model's have 4", vae=vae_of_16_channels())
    refused("positive has 5 rows, but there are 3 panels, and 2 transitions", positive=text(1, rows=5))
    refused("negative has 4 rows, but there are 3 panels", negative=text(1, rows=4))
    wide = dataclasses.replace(embeds, tokens=embeds.tokens[..., :64])
    refused(r"smp_embeds were predicted with another SMP: .* \(4 x 64\) .* \(4 x 768\)", embeds=wide)
    moving = StoryApplyMotionModule.execute(model, motion_module).args[0]
    refused("has a motion module already", model=moving)
