"""Node: Encode Story Prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .panel_conditioning import repeat_rows, stack_conditioning
from .story_text import Story
from .story_type import StoryType
from .subject_tokens import SUBJECTS_KEY, subject_positions


class StoryEncodePrompts(io.ComfyNode):
    """Encode a story's prompts to conditioning with one row per panel."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StoryEncodePrompts",
            display_name="Encode Story Prompts",
            category="StoryDiffusion",
            description=(
                "Encodes all prompts of a story at once: row i of the conditioning belongs to panel i, so a stock "
                "KSampler draws every panel of the batch from its own prompt."
            ),
            search_aliases=["StoryDiffusion", "CLIP text encode batch", "prompt per image", "batch prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the SD1.5 or SDXL checkpoint."),
                StoryType.Input("story", tooltip="The story from Story Prompt Splitter."),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="One row per panel. The latent batch must have as many."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The story's negative prompt, one equal row per panel."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, story: Story) -> io.NodeOutput:
        """Encode each prompt, then stack."""
        if clip is None:
            raise ValueError("clip is None: this checkpoint holds no text encoder. Load one with Load CLIP.")

        def encode(prompt: str) -> Any:
            return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

        positive = stack_conditioning([encode(panel.prompt) for panel in story.panels])
        subjects = [subject_positions(clip.tokenize, panel.prompt, panel.subjects) for panel in story.panels]
        for _, options in positive:
            options[SUBJECTS_KEY] = subjects
        negative = repeat_rows(encode(story.negative), len(story.panels))
        return io.NodeOutput(positive, negative)
