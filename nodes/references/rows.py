"""Given pictures as extra rows in front of a story's latent batch. Host-free."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..host.types import Latent
from ..story.model import CONNECT_PANEL_COUNT, Story


def require_a_row_each(story: Story, latent: Latent) -> None:
    """ValueError unless the latent batch has a row for each panel of the story."""
    panels, rows = len(story.panels), latent["samples"].shape[0]
    if rows != panels:
        raise ValueError(f"The story has {panels} panels, but the latent batch has {rows}. {CONNECT_PANEL_COUNT}")


def require_pictures(images: torch.Tensor) -> None:
    """ValueError unless `images` are pictures, [N, H, W, 3 or more]."""
    if images.ndim != 4 or images.shape[-1] < 3 or 0 in images.shape:
        raise ValueError(f"images has the shape {tuple(images.shape)}; it must be [pictures, height, width, 3].")


def add_reference_rows(latent: Latent, references: torch.Tensor) -> Latent:
    """Put encoded pictures (R, C, H, W) in front of the rows of `latent`.

    The new noise mask keeps the references as they are (0) and leaves the panels to the sampler (1, or their own
    mask). Panels begin from the noise they would have without references: `batch_index` numbers them from 0 as before.

    Raises:
        ValueError: if the references are of another size than the latent, or the latent's own entries don't fit it.
    """
    samples = latent["samples"]
    for what, tensor in (("latent", samples), ("vae", references)):
        if tensor.ndim != 4:
            raise ValueError(
                f"{what} gives a batch of the shape {tuple(tensor.shape)}; it must be [panels, channels, height, "
                f"width]: one picture for each panel, no video."
            )
    if references.shape[2:] != samples.shape[2:]:
        (height, width), (own_height, own_width) = samples.shape[2:], references.shape[2:]
        raise ValueError(
            f"The reference images encode to {own_width} x {own_height} latents, but the latent batch is {width} x "
            f"{height}. Bring them to the size of the panels, with Upscale Image and crop 'center' for example."
        )
    if references.shape[1] != samples.shape[1]:
        # An empty latent made for another model: the host itself fits its channels, but only while it is all zero.
        if samples.any():
            raise ValueError(
                f"The vae gives {references.shape[1]} latent channels, but the latent batch has {samples.shape[1]}. "
                f"Encode both with the same VAE."
            )
        samples = samples.new_zeros(samples.shape[0], *references.shape[1:])
    count, panels = references.shape[0], samples.shape[0]
    numbers = list(latent.get("batch_index", range(panels)))
    if len(numbers) != panels:
        raise ValueError(f"The latent's batch_index numbers {len(numbers)} rows, but it has {panels}.")
    return {
        **latent,
        "samples": torch.cat([references.to(samples), samples]),
        "noise_mask": torch.cat([torch.zeros(count, 1, *samples.shape[2:]), _panel_mask(latent, samples)]),
        "batch_index": [*range(max(numbers) + 1, max(numbers) + 1 + count), *numbers],
    }


def _panel_mask(latent: Latent, samples: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) mask of the panels: their own at latent size, or 1 everywhere."""
    panels, _, height, width = samples.shape
    mask = latent.get("noise_mask")
    if mask is None:
        return torch.ones(panels, 1, height, width)
    if mask.ndim < 2 or 0 in mask.shape:
        shape = tuple(mask.shape)
        raise ValueError(f"The latent's noise mask has the shape {shape}; it must be [panels, height, width].")
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
    if mask.shape[0] not in (1, panels):
        raise ValueError(f"The latent's noise mask has {mask.shape[0]} rows; it must have 1 or {panels}, one a panel.")
    mask = F.interpolate(mask, size=(height, width), mode="bilinear")
    return mask.expand(panels, -1, -1, -1)
