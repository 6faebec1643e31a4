"""Node: Story Contact Sheet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..host.notices import tell
from ..story.socket import StoryType
from .layout import story_page

if TYPE_CHECKING:
    import torch

    from ..story.model import Story


class StoryContactSheet(io.ComfyNode):
    """All panels with their captions on one page (`layout.story_page`)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryContactSheet",
            display_name="Story Contact Sheet",
            category="StoryDiffusion",
            description="Puts all panels of a story on one page, each with its caption under it.",
            search_aliases=["StoryDiffusion", "comic page", "storyboard", "image grid", "captions"],
            inputs=[
                io.Image.Input("images", tooltip="The panels, one image per panel of the story, in its order."),
                StoryType.Input("story", tooltip="The story from Story Prompt Splitter: its captions are written."),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="The most panels in a row. 0 chooses a number that makes the page about 4:3.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet",
                    tooltip="One image: the page. Panels keep their size and their exact pixels.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, story: Story, columns: int) -> io.NodeOutput:
        page, warning = story_page(images, story, columns)
        size = f"{images.shape[0]} panels, {page.shape[2]} x {page.shape[1]} pixels"
        tell(cls.hidden, "Story Contact Sheet", warning, otherwise=size)
        # For those who run it headless: the warning is in the job's history.
        return io.NodeOutput(page, ui=ui.PreviewText(warning) if warning else None)
