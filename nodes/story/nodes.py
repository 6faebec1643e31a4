"""Node: Story Prompt Splitter."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.notices import tell
from .parser import parse_story
from .sentences import SPLIT_MODES
from .socket import StoryType
from .styles import STYLES


class StoryPromptSplitter(io.ComfyNode):
    """Story text in, one prompt and one caption per panel out (`parser.parse_story`)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
                    dynamic_prompts=True,
                    placeholder="[Bob] walks in the forest #A quiet morning\n[Bob] gives [Alice] a flower\n"
                    "[NC] the sun sets over the lake",
                    tooltip="What happens, panel by panel. [Bob] puts a character into the panel and those "
                    "after it; [NC] is a panel without characters; #text is the caption, up to the end of "
                    "the line. Plain text without any tags is fine too.",
                ),
                io.String.Input(
                    "characters",
                    multiline=True,
                    dynamic_prompts=True,
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
                    dynamic_prompts=True,
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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, story: str, split_by: str, style: str, negative: str, characters: str = "") -> io.NodeOutput:
        parsed = parse_story(story, characters, split_by=split_by, style=style, negative=negative)
        notice = "\n".join(parsed.notices)
        tell(cls.hidden, "Story Prompt Splitter", notice, otherwise=f"{len(parsed.panels)} panels")
        prompts = [panel.prompt for panel in parsed.panels]
        captions = [panel.caption for panel in parsed.panels]
        # For those who run it headless: the notice is in the job's history.
        shown = ui.PreviewText(notice) if notice else None
        return io.NodeOutput(parsed, prompts, captions, parsed.negative, len(parsed.panels), ui=shown)
