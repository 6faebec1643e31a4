"""Nodes that read a story's text, and that show its panels on one page."""

from __future__ import annotations

import logging

import torch
from comfy_api.latest import io, ui
from server import PromptServer

from .contact_sheet import contact_sheet
from .sentences import SPLIT_MODES
from .story_text import Story, parse_story
from .story_type import StoryType
from .styles import STYLES


class StoryPromptSplitter(io.ComfyNode):
    """Story text in, one prompt and one caption per panel out (`story_text.parse_story`)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="StoryPromptSplitter",
            display_name="Story Prompt Splitter",
            category="StoryDiffusion",
            description="Cuts a story into panels and writes one prompt for each, with the looks of its "
            "characters in every panel in which they stand.",
            search_aliases=[
                "StoryDiffusion",
                "storyboard",
                "comic panels",
                "character sheet",
                "split prompt",
            ],
            inputs=[
                io.String.Input(
                    "story",
                    multiline=True,
                    placeholder="[Bob] walks in the forest #A quiet morning\n[Bob] gives [Alice] a flower\n"
                    "[NC] the sun sets over the lake",
                    tooltip="What happens, panel by panel. [Bob] puts a character into the panel and those "
                    "after it; [NC] is a panel without characters; #text is the caption, up to the end of "
                    "the line. Plain text without any tags is fine too.",
                ),
                io.String.Input(
                    "characters",
                    multiline=True,
                    optional=True,
                    default="",
                    placeholder="[Bob] a man with a red cap, gray beard\n[Alice] a girl with a blue dress",
                    tooltip="Who the characters are, one line each: [Name] and what they look like. The "
                    "description goes into the prompt of every panel in which the character stands. If "
                    "anyone is described here, a [Name] that isn't is an error; if nobody is, the name "
                    "itself goes into the prompt.",
                ),
                io.Combo.Input(
                    "split_by",
                    options=list(SPLIT_MODES),
                    default="auto",
                    tooltip="What becomes one panel. line: each line. paragraph: lines with no blank line "
                    "between them. sentence: each sentence (English, Chinese, Japanese, Korean). auto: line "
                    "if the story has several lines, sentence if it is a single one.",
                ),
                io.Combo.Input(
                    "style",
                    options=list(STYLES),
                    default="none",
                    tooltip="Words put around every prompt so that all panels share one look, and added to "
                    "the negative prompt. none: prompts stay as written.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    placeholder="blurry, extra fingers",
                    tooltip="What no panel should show. The style's own negative is added at the end.",
                ),
            ],
            outputs=[
                StoryType.Output(
                    display_name="story",
                    tooltip="The story (prompts, captions, who stands where) for the other Story nodes.",
                ),
                io.String.Output(
                    display_name="prompts",
                    is_output_list=True,
                    tooltip="List: the full prompt of each panel.",
                ),
                io.String.Output(
                    display_name="captions", is_output_list=True, tooltip="List: the caption of each panel."
                ),
                io.String.Output(
                    display_name="negative", tooltip="The negative prompt: yours, then that of the style."
                ),
                io.Int.Output(
                    display_name="panel_count",
                    tooltip="How many panels there are. Connect it to the batch_size of an empty latent.",
                ),
            ],
        )

    @classmethod
    def execute(cls, story: str, split_by: str, style: str, negative: str, characters: str = "") -> io.NodeOutput:
        """Parse the story; ValueError names the line that cannot be read."""
        parsed = parse_story(story, characters, split_by=split_by, style=style, negative=negative)
        prompts = [panel.prompt for panel in parsed.panels]
        captions = [panel.caption for panel in parsed.panels]
        return io.NodeOutput(parsed, prompts, captions, parsed.negative, len(parsed.panels))


class StoryContactSheet(io.ComfyNode):
    """All panels with their captions on one page (`contact_sheet.contact_sheet`)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
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
        """Lay the page out; a caption that no font can draw is warned of in the log and on the node."""
        _require_the_panels_own_story(images.shape[0], story)
        page, warning = contact_sheet(images, [panel.caption for panel in story.panels], columns)
        if warning:
            logging.warning("Story Contact Sheet: %s", warning)
        if cls.hidden and cls.hidden.unique_id:
            # The canvas shows this on the node. Sent on every run, so that an old warning doesn't stay there.
            size = f"{images.shape[0]} panels, {page.shape[2]} x {page.shape[1]} pixels"
            PromptServer.instance.send_progress_text(warning or size, cls.hidden.unique_id)
        # For those who run it headless: the warning is in the job's history.
        return io.NodeOutput(page, ui=ui.PreviewText(warning) if warning else None)


def _require_the_panels_own_story(images: int, story: Story) -> None:
    """Refuse the story of Add Reference Panels with the panels alone: its captions begin with those of the pictures."""
    references = sum(panel.is_reference for panel in story.panels)
    if references and images != len(story.panels):
        raise ValueError(
            f"There are {images} images, but this story has {len(story.panels)} panels, of which {references} are "
            f"reference pictures. Connect the story of Story Prompt Splitter, not that of Add Reference Panels, and "
            f"take the panels alone with Get Image from Batch: reference_count to batch_index, panel_count to length."
        )
