"""Nodes around other video models: Panel Pairs, Join Clips."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..story.socket import StoryType
from .formats import VIDEO_FORMATS
from .joining import join_clips
from .pairs import require_panels, resize

if TYPE_CHECKING:
    from torch import Tensor

    from ..story.model import Story


class StoryPanelPairs(io.ComfyNode):
    """Every two neighbouring panels as first and last frame for a first-last-frame video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
        require_panels(images, story)
        width, height, length = VIDEO_FORMATS[video_model].legal_clip(images.shape[2], images.shape[1], frames)
        panels = resize(images[..., :3], width, height).split(1)
        prompts = [panel.prompt for panel in story.panels[1:]] if story else [""] * (len(panels) - 1)
        return io.NodeOutput(list(panels[:-1]), list(panels[1:]), prompts, width, height, length, len(panels) - 1)


class StoryJoinClips(io.ComfyNode):
    """Join clips that meet in a panel to one video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
        video = join_clips(clips)
        return io.NodeOutput(video, video.shape[0])
