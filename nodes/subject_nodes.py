"""Node: Set Subject Masks."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io

from .story_text import Story
from .story_type import StoryType


def set_subject_masks(story: Story, character: str, masks: torch.Tensor) -> Story:
    """`story` with masks (1 or panels, H, W) of where `character`, in any spelling, stands in the panels that name it.

    Raises:
        ValueError: if the story has no such character, or the masks are neither one nor one per panel.
    """
    name = story.own_name(character)
    if name is None:
        known = ", ".join(story.characters) or "none"
        raise ValueError(f"character is {character!r}; the story's characters are: {known}.")
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


class StorySetSubjectMasks(io.ComfyNode):
    """Say where a character stands, instead of letting the model find it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StorySetSubjectMasks",
            display_name="Set Subject Masks",
            category="StoryDiffusion",
            description=(
                "Says where a character stands in the panels. Without it Consistent Self-Attention finds the character "
                "by where the model looks at the words that describe it."
            ),
            search_aliases=["StoryDiffusion", "character mask", "region", "regional"],
            inputs=[
                StoryType.Input("story", tooltip="The story from Story Prompt Splitter."),
                io.String.Input(
                    "character", tooltip="The name in the story's tags, with or without brackets: Bob for [Bob]."
                ),
                io.Mask.Input(
                    "masks",
                    tooltip="White where the character stands: one mask for all panels, or a batch with one per panel "
                    "(those of panels without the character are not looked at). Any size.",
                ),
            ],
            outputs=[
                StoryType.Output(
                    display_name="story",
                    tooltip="The story with the masks, for Apply Consistent Self-Attention. Chain one node per "
                    "character.",
                )
            ],
        )

    @classmethod
    def execute(cls, story: Story, character: str, masks: torch.Tensor) -> io.NodeOutput:
        """Attach the masks."""
        return io.NodeOutput(set_subject_masks(story, character.strip().strip("[]【】［］"), masks))
