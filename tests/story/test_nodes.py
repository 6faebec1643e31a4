"""The two text nodes as the host sees them."""

from __future__ import annotations

import logging

import pytest
import torch
from comfy_api.latest import io
from storydiffusion.nodes.pages.caption_fonts import BUNDLED_FONT
from storydiffusion.nodes.pages.layout import contact_sheet
from storydiffusion.nodes.pages.nodes import StoryContactSheet
from storydiffusion.nodes.references.panels import add_reference_panels, read_references
from storydiffusion.nodes.story.model import Story
from storydiffusion.nodes.story.nodes import StoryPromptSplitter
from storydiffusion.nodes.story.parser import parse_story

PACK_ROOT = BUNDLED_FONT.parents[3]
STORY = "[Bob] walks #One\n[NC] rain"


def split(**changes: str) -> io.NodeOutput:
    inputs = {"story": STORY, "split_by": "auto", "style": "none", "negative": "blurry"}
    return StoryPromptSplitter.execute(**(inputs | changes))


@pytest.mark.parametrize("node", [StoryPromptSplitter, StoryContactSheet])
def test_schema_and_help(node: type[io.ComfyNode]) -> None:
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__
    assert schema.category == "StoryDiffusion"
    assert schema.description
    assert schema.search_aliases
    for socket in [*schema.inputs, *schema.outputs]:
        assert socket.tooltip
    help_page = (PACK_ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert help_page.startswith(f"# {schema.display_name}\n")
    for socket in [*schema.inputs, *schema.outputs]:
        assert f"**{socket.id or socket.display_name}**" in help_page or f"**{socket.display_name}**" in help_page


def test_splitter_interface_is_the_public_one() -> None:
    info = StoryPromptSplitter.GET_NODE_INFO_V1()
    assert info["display_name"] == "Story Prompt Splitter"
    assert list(info["input"]["required"]) == ["story", "split_by", "style", "negative"]
    assert list(info["input"]["optional"]) == ["characters"]
    assert info["output"] == ["STORYDIFFUSION_STORY", "STRING", "STRING", "STRING", "INT"]
    assert info["output_name"] == ["story", "prompts", "captions", "negative", "panel_count"]
    assert info["output_is_list"] == [False, True, True, False, False]


def test_splitter() -> None:
    story, prompts, captions, negative, count = split(characters="[Bob] a man").args
    assert story == parse_story(STORY, "[Bob] a man", negative="blurry")
    assert isinstance(story, Story)
    assert prompts == ["a man, walks", "rain"]
    assert captions == ["One", "rain"]
    assert negative == "blurry"
    assert count == 2


def test_splitter_error_reaches_the_user() -> None:
    with pytest.raises(ValueError, match=r"line 1 .*\[Bob\] is not in the characters field"):
        split(characters="[Alice] a girl")


def test_contact_sheet_writes_the_captions() -> None:
    story, images = split().args[0], torch.rand(2, 64, 64, 3)
    output = StoryContactSheet.execute(images, story, 2)
    assert torch.equal(output.args[0], contact_sheet(images, ["One", "rain"], 2)[0])
    assert output.ui is None
    with pytest.raises(ValueError, match="There are 1 images, but the story has 2 panels"):
        StoryContactSheet.execute(images[:1], story, 0)


def test_contact_sheet_of_panels_drawn_after_pictures() -> None:
    story = split().args[0]
    with_picture = add_reference_panels(story, read_references("[Bob] stands", "", 1, 2.0))
    advice = r"2 images, but this story has 3 panels, of which 1 are.*Connect the story of Story Prompt Splitter"
    with pytest.raises(ValueError, match=advice):
        StoryContactSheet.execute(torch.rand(2, 64, 64, 3), with_picture, 0)
    StoryContactSheet.execute(torch.rand(3, 64, 64, 3), with_picture, 0)  # the picture on the sheet too


def test_contact_sheet_warns_in_log_and_result(caplog: pytest.LogCaptureFixture) -> None:
    # A noncharacter is in no font, whatever the machine has installed.
    story = split(story="[Bob] walks #\U0001fffe").args[0]
    with caplog.at_level(logging.WARNING):
        output = StoryContactSheet.execute(torch.rand(1, 64, 64, 3), story, 0)
    assert "No font on this machine" in caplog.text
    assert "No font on this machine" in output.ui.as_dict()["text"][0]
