"""Node: Encode Story Prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..host.notices import tell
from ..story.socket import StoryType
from .encoding import encode_story, missing_embeddings, with_words_around

if TYPE_CHECKING:
    from comfy.sd import CLIP

    from ..story.model import Story


class StoryEncodePrompts(io.ComfyNode):
    """Encode a story's prompts to conditioning with one row per panel."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
                io.String.Input(
                    "prefix",
                    multiline=True,
                    dynamic_prompts=True,
                    optional=True,
                    default="",
                    tooltip="Words in front of every panel's prompt, for what Conditioning (Concat) can't do: it joins "
                    "two conditionings of equally many rows.",
                    advanced=True,
                ),
                io.String.Input(
                    "suffix",
                    multiline=True,
                    dynamic_prompts=True,
                    optional=True,
                    default="",
                    tooltip="Words behind every panel's prompt.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="One row per panel. The latent batch must have as many."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The story's negative prompt, one equal row per panel."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip: CLIP | None, story: Story, prefix: str = "", suffix: str = "") -> io.NodeOutput:
        if clip is None:
            raise ValueError("clip is None: this checkpoint holds no text encoder. Load one with Load CLIP.")
        story = with_words_around(story, prefix, suffix)
        warning = missing_embeddings(clip, story)
        tell(cls.hidden, "Encode Story Prompts", warning, otherwise=f"{len(story.panels)} prompts")
        # For those who run it headless: the warning is in the job's history.
        return io.NodeOutput(*encode_story(clip, story), ui=ui.PreviewText(warning) if warning else None)
