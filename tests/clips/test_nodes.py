"""Panel Pairs and Join Clips as nodes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from comfy_extras.nodes_lt import EmptyLTXVLatentVideo, LTXVAddGuide
from comfy_extras.nodes_wan import WanFirstLastFrameToVideo
from storydiffusion.nodes.clips.formats import VIDEO_FORMATS
from storydiffusion.nodes.clips.nodes import StoryJoinClips, StoryPanelPairs
from storydiffusion.nodes.story.parser import parse_story
from torch import Tensor

WAN, LTX = VIDEO_FORMATS


def panels(count: int, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(0))


def pair(images: Tensor, video_model: str = WAN, frames: int = 81, story: Any = None) -> dict[str, Any]:
    ids = [output.display_name or output.id for output in StoryPanelPairs.define_schema().outputs]
    return dict(zip(ids, StoryPanelPairs.execute(images, video_model, frames, story).args, strict=True))


def test_pairs_are_neighbours_in_order() -> None:
    images = panels(4)
    result = pair(images)
    assert result["pair_count"] == len(result["start_image"]) == len(result["end_image"]) == len(result["prompts"]) == 3
    for number in range(3):  # legal sizes already: the very pixels
        assert torch.equal(result["start_image"][number], images[number : number + 1])
        assert torch.equal(result["end_image"][number], images[number + 1 : number + 2])
    assert (result["width"], result["height"], result["length"]) == (48, 32, 81)


@pytest.mark.parametrize("shape", [(32, 48, 3), (2, 0, 48, 3), (2, 4, 1, 3)])
def test_pictures_that_are_none_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"images has the shape {re.escape(str(shape))}"):
        pair(torch.zeros(shape))


@pytest.mark.parametrize(("video_model", "size"), [(WAN, (64, 48)), (LTX, (64, 64))])
def test_images_and_numbers_agree_on_a_legal_size(video_model: str, size: tuple[int, int]) -> None:
    result = pair(panels(2, height=50, width=70), video_model)
    assert (result["width"], result["height"]) == size
    for name in ("start_image", "end_image"):
        assert [image.shape for image in result[name]] == [(1, size[1], size[0], 3)]


def test_cutting_to_the_aspect_ratio_keeps_the_centre() -> None:
    images = panels(2, height=32, width=36)
    images[:] = torch.linspace(0, 1, 36)[:, None]
    (start,) = pair(images)["start_image"]
    assert start.shape == (1, 32, 32, 3)
    assert torch.equal(start[0], images[0, :, 2:34])


def test_a_pair_has_the_prompt_of_the_panel_it_arrives_at() -> None:
    story = parse_story("[Mina] waits\n[Mina] walks\n[NC] the sea", "[Mina] a girl", split_by="line", style="none")
    assert pair(panels(3), story=story)["prompts"] == [panel.prompt for panel in story.panels[1:]]
    assert pair(panels(3))["prompts"] == ["", ""]
    with pytest.raises(ValueError, match="images holds 2 panels, but story has 3"):
        pair(panels(2), story=story)


def test_one_panel_is_refused() -> None:
    with pytest.raises(ValueError, match="images holds 1 panel; a clip needs two"):
        pair(panels(1))


def inputs_of(node: Any) -> dict[str, Any]:
    return {entry.id: entry for entry in node.define_schema().inputs}


def test_the_hosts_video_nodes_take_these_sizes_and_lengths() -> None:
    wan, ltx = inputs_of(WanFirstLastFrameToVideo), inputs_of(EmptyLTXVLatentVideo)
    for name, inputs in ((WAN, wan), (LTX, ltx)):
        step = VIDEO_FORMATS[name]
        assert step.size_step % inputs["width"].step == step.size_step % inputs["height"].step == 0
        assert step.frame_step % inputs["length"].step == 0
    assert {"start_image", "end_image"} <= wan.keys()
    assert {"image", "frame_idx"} <= inputs_of(LTXVAddGuide).keys()


def test_clips_from_a_list_become_one_video() -> None:
    clips = [panels(5), panels(5) / 2]
    assert StoryJoinClips.define_schema().is_input_list
    video, count = StoryJoinClips.execute(clips=clips).args
    assert count == len(video) == 9
    assert torch.equal(video[4:], clips[1])
    assert torch.equal(video[:4], clips[0][:4])
