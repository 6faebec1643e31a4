"""Holding the ends of a transition to its panels while it is sampled. Host-free.

A held frame's latents are replaced before each model call by its panel's latents at that call's noise level, and after
it by its panel's latents. While that goes on the motion module sees the true panels among the frames; once a frame is
released it is denoised like any other, from where the panel left it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ANCHORS: Mapping[str, tuple[float, ...]] = {
    "off": (),
    "hold": (1.0,),
    "hold, soft neighbours": (1.0, 0.6, 0.3),
    "release late": (0.8, 0.5, 0.3),
}
"""For each distance from the nearest end of the clip, the part of sampling for which such a frame is held."""


def hold_parts(frames: int, ramp: Sequence[float]) -> Tensor:
    """Return for every frame the part of sampling, 0 to 1, for which it is held to the panel at its end.

    Args:
        frames: F, at least 2.
        ramp: parts by distance from the end: 1.0 never lets go, frames beyond the ramp are never held. In a short
            clip each end keeps to its own half, and the middle frame of an odd one belongs to neither.

    Returns:
        (F,)
    """
    parts = torch.zeros(frames)
    for distance, part in enumerate(ramp[: frames // 2]):
        parts[[distance, frames - 1 - distance]] = part
    return parts


def held_latents(first: Tensor, last: Tensor, parts: Tensor) -> Tensor:
    """Return what each frame is held to: the panel at its end, and zeros where it isn't held at all.

    Args:
        first: (C, h, w), latents of the panel the clip starts from.
        last: (C, h, w), latents of the panel it arrives at.
        parts: (F,), from `hold_parts`.

    Returns:
        (F, C, h, w)
    """
    frames = parts.shape[0]
    latents = first.new_zeros(frames, *first.shape)
    for frame in parts.nonzero().flatten().tolist():
        latents[frame] = first if frame < frames / 2 else last
    return latents


@dataclass(frozen=True, eq=False)
class HoldMask:
    """The host's `denoise_mask_function`: which frames a model call may change.

    A binary mask, and not a fade: mixing a half-free frame with a noised panel would lower its noise below what the
    model is told.

    Attributes:
        release_sigmas: (F,), the noise level below which each frame is free.
        previous: another node's function (Differential Diffusion's), which has to agree that a frame is free.
    """

    release_sigmas: Tensor
    previous: Callable[..., Tensor] | None = None

    def __call__(self, sigma: Tensor, denoise_mask: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        """Return (F, 1, 1, 1), 0 for held frames and 1 for free ones; sigma (F,), the call's noise level."""
        free = sigma <= self.release_sigmas.to(sigma)
        mask = free[:, None, None, None].to(denoise_mask)
        return mask if self.previous is None else mask * self.previous(sigma, denoise_mask, extra_options=extra_options)
