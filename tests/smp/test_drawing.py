"""Clips drawn while training and measuring: a model whose right answer is a formula, and diffusers' own pipeline."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from storydiffusion.devtools.tiny.clips import FRAMES, WIDTH, tiny_config
from storydiffusion.devtools.tiny.motion import motion_config, motion_tensors
from storydiffusion.devtools.tiny.motion_oracle import PerFrameGroupNorm
from storydiffusion.devtools.tiny.sd15 import UNET_WIDTHS, write_sd15
from storydiffusion.smp.evaluation.clip_scores import Measures
from storydiffusion.smp.evaluation.transitions import Drawing, compare_transitions
from storydiffusion.smp.injection import AddedKV
from storydiffusion.smp.interpolation import interpolate_linear
from storydiffusion.smp.model import SemanticMotion
from storydiffusion.smp.training.config import TrainConfig
from storydiffusion.smp.training.data.clips import Clip, ClipsInMemory
from storydiffusion.smp.training.data.encode import SD15Encoder
from storydiffusion.smp.training.run.start import start_smp
from storydiffusion.smp.training.stages.decoding import DecodingStage
from storydiffusion.smp.training.stages.denoiser import Denoiser
from storydiffusion.smp.training.stages.load_sd15 import animatediff_scheduler, load_unet, load_vae
from storydiffusion.smp.training.stages.sampling import Conditioning, sample_clips
from storydiffusion.smp.training.stages.unet_denoiser import UNetMotionDenoiser, unet_sites
from torch import Tensor

SIDE = 4
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64), dim=0)
"""AnimateDiff's signal share at each of 1000 times: betas go straight from SD1.5's first to its last."""


def picture(tokens: Tensor, text: Tensor) -> Tensor:
    """What the painter wants to see: (B, F, N, C) and (B, T, D) -> latents (B, F, 4, SIDE, SIDE)."""
    levels = tokens[:, :, 0, :4] + text[:, None, 0, :4]
    return levels[..., None, None].expand(-1, -1, -1, SIDE, SIDE)


class Painter(Denoiser):
    """A model that is never wrong: it names the noise that lies over its picture, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(AddedKV(start_smp(tiny_config(Path()))[0].config.sites, WIDTH), animatediff_scheduler())
        self.asked: list[tuple[int, Tensor]] = []

    def predict(self, noisy_frames: Tensor, timesteps: Tensor, text: Tensor, added_tokens: Tensor) -> Tensor:
        self.asked.append((int(timesteps[0]), noisy_frames))
        signal = ALPHAS[timesteps].float()[:, None, None, None, None]
        return (noisy_frames - signal.sqrt() * picture(added_tokens, text)) / (1 - signal).sqrt()

    def to_pixels(self, latents: Tensor) -> Tensor:
        return latents[:, :, :3].movedim(2, -1).sigmoid()


def conditioning(seed: int, batch: int = 1) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, FRAMES, 1, WIDTH, generator=generator) / 3
    return Conditioning(tokens, torch.randn(batch, 7, 6, generator=generator) / 3)


def guided(given: Conditioning, blank: Conditioning, cfg: float) -> Tensor:
    """Classifier-free guidance: from the unconditional picture `cfg` times the way to the conditional one."""
    without = picture(blank.tokens, blank.text)
    return without + cfg * (picture(given.tokens, given.text) - without)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guidance_goes_from_the_blank_towards_what_is_given(cfg: float) -> None:
    given, blank = conditioning(0, batch=2), conditioning(1)
    noise = torch.randn(2, FRAMES, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    drawn = sample_clips(Painter(), given, blank, noise, steps=5, cfg=cfg)
    wanted, first, last = guided(given, blank, cfg), ALPHAS[800], ALPHAS[0]  # 800, 600, .. 0; noise is left at 0
    left = (noise - first.sqrt() * wanted) / (1 - first).sqrt()  # DDIM keeps the noise that it was told of
    expected = last.sqrt() * wanted + (1 - last).sqrt() * left
    torch.testing.assert_close(drawn, expected.float(), rtol=1e-3, atol=1e-3)


def test_held_ends_are_at_each_steps_noise_until_the_last() -> None:
    painter, generator = Painter(), torch.Generator().manual_seed(3)
    noise = torch.randn(1, FRAMES, 4, SIDE, SIDE, generator=generator)
    ends = torch.randn(1, 2, 4, SIDE, SIDE, generator=generator)
    drawn = sample_clips(painter, conditioning(0), conditioning(1), noise, steps=4, cfg=1.0, ends=ends)
    assert [time for time, _ in painter.asked] == [750, 500, 250, 0]
    for time, seen in painter.asked:
        expected = ALPHAS[time].sqrt() * ends + (1 - ALPHAS[time]).sqrt() * noise[:, [0, -1]]
        torch.testing.assert_close(seen[:, [0, -1]], expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(drawn[:, [0, -1]], ends)


def moving_smp(config: TrainConfig) -> SemanticMotion:
    """An SMP whose predictor leaves the straight line far behind, but for the two ends."""
    motion, _ = start_smp(replace(config, predictor={**config.predictor, "pin_ends": True}))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in motion.predictor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return motion


def true_clips(motion: SemanticMotion, blank: Clip, cfg: float) -> list[Clip]:
    """Clips that take the predictor's way, and look as that way looks at this guidance."""
    clips, unconditional = [], Conditioning(blank["tokens"].expand(1, FRAMES, 1, -1), blank["text"][None])
    for seed in range(3):
        ends = conditioning(10 + seed)
        with torch.no_grad():
            tokens = motion.path(ends.tokens[:, 0], ends.tokens[:, -1], FRAMES)
        latents = guided(Conditioning(tokens, ends.text), unconditional, cfg)
        clips.append({"tokens": tokens[0], "text": ends.text[0], "latents": latents[0].contiguous()})
    return clips


def blank_clip() -> Clip:
    blank = conditioning(7)
    return {"tokens": blank.tokens[0, 0], "text": blank.text[0]}


def test_a_preview_is_drawn_with_guidance_from_the_clips_two_ends(tmp_path: Path) -> None:
    config, blank = tiny_config(tmp_path, stage="decoding", preview_steps=4, preview_cfg=4.0), blank_clip()
    motion = moving_smp(config)
    clip = true_clips(motion, blank, cfg=4.0)[0]
    stage = DecodingStage(motion, Painter(), config, blank)
    unseen = {**clip, "tokens": torch.cat([clip["tokens"][:1], torch.zeros(FRAMES - 2, 1, WIDTH), clip["tokens"][-1:]])}
    with torch.no_grad():
        shown = {
            name: np.stack([np.asarray(image) for image in images]) / 255
            for name, images in stage.preview(unseen).items()
        }
    pixels = Painter().to_pixels(clip["latents"][None])[0].numpy()
    np.testing.assert_allclose(shown["true"], pixels, atol=0.003)
    np.testing.assert_allclose(shown["drawn"], pixels, atol=0.05)  # DDIM leaves the noise of time 0
    plain = Painter().to_pixels(picture(clip["tokens"][None], clip["text"][None]))[0].numpy()
    assert np.abs(plain - pixels).max() > 0.2


def test_the_way_that_the_true_clips_take_wins_against_the_straight_one(tmp_path: Path) -> None:
    config, blank, cfg = tiny_config(tmp_path), blank_clip(), 3.0
    motion = moving_smp(config)
    clips = true_clips(motion, blank, cfg)
    rows = compare_transitions(
        motion, Painter(), ClipsInMemory(clips, blank), [2, 0], Measures(), Drawing(steps=4, cfg=cfg)
    )
    for place, number in enumerate((2, 0)):
        clip = clips[number]
        line = interpolate_linear(clip["tokens"][None, 0], clip["tokens"][None, -1], FRAMES)
        unconditional = Conditioning(blank["tokens"].expand(1, FRAMES, 1, -1), blank["text"][None])
        straight = guided(Conditioning(line, clip["text"][None]), unconditional, cfg)
        pixels = [Painter().to_pixels(latents)[0, 1:-1] for latents in (straight, clip["latents"][None])]
        off = (line[0, 1:-1] - clip["tokens"][1:-1]).square().mean().item()
        smp, linear = rows["SMP"][place], rows["linear interpolation"][place]
        assert smp["token error"] == pytest.approx(0, abs=1e-6)
        assert linear["token error"] == pytest.approx(off, rel=1e-4)
        assert smp["pixel error"] < 0.01  # DDIM leaves the noise of time 0
        assert linear["pixel error"] == pytest.approx((pixels[0] - pixels[1]).abs().mean().item(), abs=0.01)
        assert linear["pixel error"] > 0.03


# diffusers


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    write_sd15(folder)
    module = motion_tensors(motion_config(UNET_WIDTHS, res_blocks=1), dtype=torch.float32)
    torch.save(module, folder / "mm.ckpt")
    return folder


@pytest.mark.slow
def test_a_clip_is_the_one_that_diffusers_pipeline_draws(sd15: Path) -> None:
    unet, encoder, cfg, steps = load_unet(sd15, sd15 / "mm.ckpt"), SD15Encoder(sd15, torch.device("cpu")), 4.0, 3
    theirs = copy.deepcopy(unet)
    for module in theirs.modules():
        if isinstance(module, AnimateDiffTransformer3D):  # diffusers pools the frames' statistics, AnimateDiff doesn't
            norm = module.norm
            module.norm = PerFrameGroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps)
            module.norm.load_state_dict(norm.state_dict())
    pipeline = AnimateDiffPipeline(
        vae=load_vae(sd15),
        text_encoder=encoder.text,
        tokenizer=encoder.tokenizer,
        unet=theirs,
        motion_adapter=None,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="linear",
            clip_sample=False,
            set_alpha_to_one=False,
            timestep_spacing="leading",
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    asked = {"num_frames": FRAMES, "height": 64, "width": 64, "num_inference_steps": steps, "guidance_scale": cfg}
    expected = pipeline("a square", latents=noise.transpose(1, 2), output_type="pt", **asked).frames.movedim(2, -1)

    sites = unet_sites(unet)
    denoiser = UNetMotionDenoiser(  # added values of zero add nothing
        unet.eval(), AddedKV(sites, WIDTH), animatediff_scheduler(), guidance="decoupled", vae=load_vae(sd15)
    )
    nothing = torch.zeros(1, FRAMES, 1, WIDTH)
    given, blank = (Conditioning(nothing, encoder.encode_text(text)[None]) for text in ("a square", ""))
    drawn = sample_clips(denoiser, given, blank, noise, steps=steps, cfg=cfg)
    torch.testing.assert_close(denoiser.to_pixels(drawn), expected, rtol=1e-3, atol=1e-3)
    inner = expected[(expected > 0) & (expected < 1)]
    assert len(inner) > 0.5 * expected.numel()  # it is no flat clip of clamped pixels
    assert inner.std() > 0.05
