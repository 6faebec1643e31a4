"""Node: Set Subject Masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..story.socket import StoryType
from .given_masks import set_subject_masks

if TYPE_CHECKING:
    import torch

    from ..story.model import Story


class StorySetSubjectMasks(io.ComfyNode):
    """Say where a character stands, instead of letting the model find it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
        return io.NodeOutput(set_subject_masks(story, character, masks))
