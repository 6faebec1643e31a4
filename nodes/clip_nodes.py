"""Nodes around other video models: Panel Pairs, Join Clips."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from .clip_joining import join_clips
from .story_text import Story
from .story_type import StoryType
from .video_formats import VIDEO_FORMATS


def resize(images: Tensor, width: int, height: int) -> Tensor:
    """Return the images (N, H, W, C) in another size, cut around the centre to its aspect ratio."""
    if images.shape[1:3] == (height, width):
        return images
    channels_first = images.movedim(-1, 1)
    return comfy.utils.common_upscale(channels_first, width, height, "bilinear", "center").movedim(1, -1)


class StoryPanelPairs(io.ComfyNode):
    """Every two neighbouring panels as first and last frame for a first-last-frame video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StoryPanelPairs",
            display_name="Panel Pairs",
            category="StoryDiffusion/video",
            description=(
                "Gives each panel and the next as first and last frame, in a size and with a frame count that the "
                "video model accepts. What is connected to the lists runs once for every pair; Join Clips makes one "
                "video of the clips."
            ),
            search_aliases=["StoryDiffusion", "first last frame", "FLF2V", "start end frame", "Wan", "LTX"],
            inputs=[
                io.Image.Input("images", tooltip="The panels in order, at least two in one batch."),
                io.Combo.Input(
                    "video_model",
                    options=list(VIDEO_FORMATS),
                    tooltip="Whose rules to follow: Wan takes sides that 16 divides and 4n + 1 frames, LTX sides that "
                    "32 divides and 8n + 1 frames.",
                ),
                io.Int.Input(
                    "frames",
                    default=81,
                    min=2,
                    max=4097,
                    tooltip="The least frames a clip shall have, both panels' own included; length is the next count "
                    "that the model accepts.",
                ),
                StoryType.Input(
                    "story",
                    optional=True,
                    tooltip="From Story Prompt Splitter, for prompts: the panels must be this story's.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "start_image", is_output_list=True, tooltip="List: the panel that each clip starts from."
                ),
                io.Image.Output("end_image", is_output_list=True, tooltip="List: the panel that each clip arrives at."),
                io.String.Output(
                    "prompts",
                    is_output_list=True,
                    tooltip="List: the prompt of the panel that each clip arrives at; empty without story.",
                ),
                io.Int.Output("width", tooltip="Width of a clip in pixels, the nearest that the model accepts."),
                io.Int.Output("height", tooltip="Height of a clip in pixels, the nearest that the model accepts."),
                io.Int.Output("length", tooltip="Frames of a clip, as many as asked for or a few more."),
                io.Int.Output("pair_count", tooltip="How many clips there will be."),
            ],
        )

    @classmethod
    def execute(cls, images: Tensor, video_model: str, frames: int, story: Story | None = None) -> io.NodeOutput:
        """Resize the panels and pair them."""
        count = images.shape[0]
        if count < 2:
            raise ValueError(f"images holds {count} panel; a clip needs two. Connect a batch of at least two panels.")
        if story is not None and len(story.panels) != count:
            raise ValueError(
                f"images holds {count} panels, but story has {len(story.panels)}. Connect the story that these panels "
                "were drawn for, or none."
            )
        video_format = VIDEO_FORMATS[video_model]
        width, height = video_format.legal_size(images.shape[2], images.shape[1])
        panels = resize(images[..., :3], width, height).split(1)
        prompts = [panel.prompt for panel in story.panels[1:]] if story else [""] * (count - 1)
        length = video_format.legal_frames(frames)
        return io.NodeOutput(list(panels[:-1]), list(panels[1:]), prompts, width, height, length, count - 1)


class StoryJoinClips(io.ComfyNode):
    """Join clips that meet in a panel to one video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StoryJoinClips",
            display_name="Join Clips",
            category="StoryDiffusion/video",
            description=(
                "Joins the clips that were made from Panel Pairs. The panel in which two clips meet is shown once: "
                "the last frame of the first of them is left out."
            ),
            search_aliases=["StoryDiffusion", "concatenate videos", "merge clips", "combine image batches"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "clips", tooltip="The clips in order, as one list: connect the VAE Decode after Panel Pairs."
                )
            ],
            outputs=[
                io.Image.Output("frames", tooltip="The video: P clips of F frames give P * (F - 1) + 1."),
                io.Int.Output("frame_count", tooltip="How many frames there are."),
            ],
        )

    @classmethod
    def execute(cls, clips: list[Tensor]) -> io.NodeOutput:
        """Join."""
        video = join_clips(clips)
        return io.NodeOutput(video, video.shape[0])
