"""Clips from noise: DDIM with classifier-free guidance, as the paper's inference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .denoiser import Denoiser


@dataclass(frozen=True)
class Conditioning:
    """Motion tokens (B, F, N', C') and text (B, T, D) of a call."""

    tokens: Tensor
    text: Tensor


@torch.no_grad()
def sample_clips(
    denoiser: Denoiser,
    given: Conditioning,
    blank: Conditioning,
    noise: Tensor,
    *,
    steps: int = 50,
    cfg: float = 7.5,
    ends: Tensor | None = None,
) -> Tensor:
    """Draw clips.

    Args:
        denoiser: the model.
        given: conditioning of the clips.
        blank: what the unconditional call sees, of the same shapes (a batch of 1 is repeated).
        noise: (B, F, c, h, w), standard normal.
        steps: DDIM steps.
        cfg: guidance scale; at 1 there is no unconditional call.
        ends: (B, 2, c, h, w) latents of the first and last frame, held there; None draws all frames freely.

    Returns:
        (B, F, c, h, w) latents.
    """
    scheduler = DDIMScheduler.from_config(denoiser.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps, device=noise.device)
    latents, batch = noise, noise.shape[0]
    for timestep in scheduler.timesteps:
        times = timestep.expand(batch)
        if ends is not None:
            latents = _hold_ends(latents, scheduler.add_noise(ends, noise[:, [0, -1]], times))
        prediction = denoiser.predict(latents, times, given.text, given.tokens)
        if cfg != 1:
            blank_text = blank.text.expand(batch, -1, -1)
            blank_prediction = denoiser.predict(latents, times, blank_text, blank.tokens.expand_as(given.tokens))
            prediction = blank_prediction + cfg * (prediction - blank_prediction)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents if ends is None else _hold_ends(latents, ends)


def _hold_ends(latents: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([ends[:, :1], latents[:, 1:-1], ends[:, 1:]], dim=1)
