"""Masks that the user gives of where a character stands. Host-free."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..story.model import Story
from ..story.place import name_some, quote


def set_subject_masks(story: Story, character: str, masks: torch.Tensor) -> Story:
    """`story` with masks (1 or panels, H, W), or one (H, W), of where `character` stands in the panels that name it.

    Any spelling of its name will do, with or without brackets.

    Raises:
        ValueError: if the story has no such character, or the masks are neither one nor one per panel.
    """
    character = character.strip().strip("[]【】［］")
    name = story.own_name(character)
    if name is None:
        known = name_some(story.characters) or "none"
        raise ValueError(f"character is {quote(character)}; the story's characters are: {known}.")
    if masks.ndim == 2:  # some nodes hand over a single mask without a batch
        masks = masks[None]
    panels = len(story.panels)
    if masks.shape[0] not in (1, panels):
        raise ValueError(
            f"masks holds {masks.shape[0]} masks, but the story has {panels} panels. Give one mask for all panels, or "
            f"one for each."
        )
    rows = masks.expand(panels, -1, -1)
    return replace(
        story,
        panels=tuple(
            replace(panel, masks={**panel.masks, name: rows[index]}) if name in panel.characters else panel
            for index, panel in enumerate(story.panels)
        ),
    )
