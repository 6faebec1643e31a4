"""Sampling transitions with the host's own samplers, with one progress bar over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.sample
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..host.preview import PanelGridPreviewer
from ..host.types import Conditioning
from .anchoring import HoldMask, held_latents, hold_parts

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Callback = Callable[[int, Tensor, Tensor, int], None]
SEEDS = 2**64 - 1
"""How many seeds there are; after the last comes 0. A generator has one more, but for a masked latent the host counts
one up from the seed that it is given."""


@dataclass(frozen=True)
class SamplerSettings:
    """The inputs of a KSampler that all transitions share, and the seed of the first."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str


@dataclass(frozen=True)
class Canvas:
    """What a transition is sampled from.

    Attributes:
        latents: (F, C, h, w), the panels' latents in the held frames, zeros in the others.
        noise_mask: (F, 1, h, w), 0 in frames that are never let go and 1 in others, or None if `anchor` is off.
    """

    latents: Tensor
    noise_mask: Tensor | None


def hold_ends(
    model: ModelPatcher, first: Tensor, last: Tensor, frames: int, ramp: tuple[float, ...]
) -> tuple[ModelPatcher, Canvas]:
    """A clone of `model` that holds the ends of a clip to two panels, and the canvas to sample it on.

    Args:
        model: the host's ModelPatcher.
        first: (C, h, w), latents of the panel the clip starts from.
        last: (C, h, w), of the one it arrives at.
        frames: F.
        ramp: see `anchoring.ANCHORS`; empty holds nothing.
    """
    parts = hold_parts(frames, ramp)
    latents = held_latents(first, last, parts)
    if not ramp:
        return model, Canvas(latents, None)
    sampling = model.get_model_object("model_sampling")
    releases = torch.tensor([sampling.percent_to_sigma(part) for part in parts.tolist()])
    model = model.clone()
    model.set_model_denoise_mask_function(HoldMask(releases, model.model_options.get("denoise_mask_function")))
    noise_mask = (parts < 1).to(latents)[:, None, None, None].expand(-1, 1, *latents.shape[2:])
    return model, Canvas(latents, noise_mask)


def sample_transition(
    model: ModelPatcher,
    positive: Conditioning,
    negative: Conditioning,
    canvas: Canvas,
    settings: SamplerSettings,
    pair: int,
    callback: Callback,
) -> Tensor:
    """Sample one transition as KSampler does, with the seed `settings.seed + pair`: (F, C, h, w)."""
    seed = (settings.seed + pair) % SEEDS
    samples = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(canvas.latents, seed),
        settings.steps,
        settings.cfg,
        settings.sampler_name,
        settings.scheduler,
        positive,
        negative,
        canvas.latents,
        noise_mask=canvas.noise_mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    if canvas.noise_mask is None:
        return samples
    # Some samplers (uni_pc, dpm_fast) stop before the noise is all gone, in held frames too.
    return torch.where(canvas.noise_mask == 0, canvas.latents.to(samples), samples)


def progress_over_pairs(model: ModelPatcher, pairs: int) -> Callable[[int], Callback]:
    """A function that gives the sampler's callback for a transition: the bar and the previews of all of them.

    A preview shows all frames: the first one, which the host would show, is often held and never changes.
    """
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    previewer = PanelGridPreviewer(previewer) if previewer else None
    bar = comfy.utils.ProgressBar(pairs)

    def callback_of(pair: int) -> Callback:
        def callback(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
            preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
            # A few samplers take a step more than they were asked for: only they know how many there are.
            bar.update_absolute(pair * total_steps + step + 1, pairs * total_steps, preview)

        return callback

    return callback_of
