"""Given pictures as extra rows in front of a story's latent batch, for its panels to be drawn after. Host-free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from .characters import as_tags
from .story_text import UNNAMED_CHARACTER, Panel, Story

Latent = dict[str, Any]
"""The host's LATENT: `samples` (B, C, H, W), optionally `noise_mask` and `batch_index`."""


def add_reference_rows(latent: Latent, references: torch.Tensor) -> Latent:
    """Put encoded pictures (R, C, H, W) in front of the rows of `latent`.

    The new noise mask keeps the references as they are (0) and leaves the panels to the sampler (1, or their own
    mask). Panels begin from the noise they would have without references: `batch_index` numbers them from 0 as before.

    Raises:
        ValueError: if the references are of another size than the latent.
    """
    samples = latent["samples"]
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
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
    if mask.shape[0] not in (1, panels):
        raise ValueError(f"The latent's noise mask has {mask.shape[0]} rows; it must have 1 or {panels}, one a panel.")
    mask = F.interpolate(mask, size=(height, width), mode="bilinear")
    return mask.expand(panels, -1, -1, -1)


def add_reference_panels(story: Story, references: Story, weight: float) -> Story:
    """`story` with the panels of `references` in front, marked as given pictures of that weight.

    Their characters get the names that the story gives them: panels share by name.

    Raises:
        ValueError: if no panel of the story has a character of some picture, so that none would look at it.
    """
    drawn = {name for panel in story.panels if not panel.is_reference for name in panel.characters}
    given = [_renamed(panel, story) for panel in references.panels]
    for number, panel in enumerate(given, 1):
        if drawn.isdisjoint(panel.characters):
            raise ValueError(_unseen(number, panel, [name for name in story.characters if name in drawn]))
    marked = tuple(replace(panel, is_reference=True, weight=weight) for panel in given)
    return replace(story, panels=marked + story.panels)


def _renamed(panel: Panel, story: Story) -> Panel:
    """`panel` with the story's own spelling of its characters."""
    names = {name: story.own_name(name) or name for name in panel.characters}
    subjects = {names[name]: phrase for name, phrase in panel.subjects.items()}
    return replace(panel, characters=tuple(names.values()), subjects=subjects)


def _unseen(number: int, panel: Panel, drawn: list[str]) -> str:
    """What is wrong with picture `number`, which shows none of the characters `drawn`."""
    named = [name for name in panel.characters if name != UNNAMED_CHARACTER]
    if not drawn:
        remedy = "No panel of the story has a character."
    elif UNNAMED_CHARACTER in drawn:
        remedy = "The story names no character: write the lines of references without tags, and leave characters empty."
    else:
        remedy = f"The story's characters are {as_tags(drawn)}: write the tag of one of them in the picture's line."
    return (
        f"No panel of the story would look at picture {number}: its line of references ({panel.caption!r}) names "
        f"{as_tags(named) or 'no character'}. {remedy}"
    )
