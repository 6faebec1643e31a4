"""Clips joined without doubled boundary frames, and the sizes and lengths that video models accept."""

from __future__ import annotations

import pytest
import torch
from storydiffusion.nodes.clips.formats import VIDEO_FORMATS
from storydiffusion.nodes.clips.joining import join_clips, joined_length, write_clips
from torch import Tensor

WAN, LTX = VIDEO_FORMATS["Wan (16k, 4n+1)"], VIDEO_FORMATS["LTX (32k, 8n+1)"]


def clip(*values: float, height: int = 2, width: int = 3) -> Tensor:
    """Frames of one value each."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, height, width, 3)


def values(video: Tensor) -> list[float]:
    assert torch.equal(video.amax(dim=(1, 2, 3)), video.amin(dim=(1, 2, 3)))
    return video[:, 0, 0, 0].tolist()


def test_the_frame_in_which_clips_meet_is_there_once() -> None:
    joined = join_clips([clip(0, 1, 2), clip(2.5, 3, 4, 5), clip(5.5, 6)])
    assert values(joined) == [0, 1, 2.5, 3, 4, 5.5, 6]  # the later clip's own first frame stays


def test_one_clip_stays_as_it_is() -> None:
    assert torch.equal(join_clips([clip(1, 2)]), clip(1, 2))
    assert torch.equal(join_clips([clip(1)]), clip(1))


def test_joined_length_of_equal_clips() -> None:
    assert joined_length([16]) == 16
    assert joined_length([16, 16]) == 2 * 16 - 1
    assert joined_length([16] * 5) == 5 * 15 + 1


def test_clips_are_written_while_they_are_made() -> None:
    alive: list[int] = []

    def make() -> object:
        for number in range(3):
            alive.append(number)
            yield clip(number, number + 1)

    assert values(write_clips(make(), 4)) == [0, 1, 2, 3]
    assert alive == [0, 1, 2]


def test_clips_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"Clip 2 is 5 x 2 pixels with 3 channels, but clip 1 is 3 x 2 pixels"):
        join_clips([clip(0, 1), clip(1, 2, width=5)])
    with pytest.raises(ValueError, match=r"Clip 2 of 3 has 1 frame\. A clip between two panels has at least 2"):
        join_clips([clip(0, 1), clip(1), clip(1, 2)])
    with pytest.raises(ValueError, match=r"Clip 2 has the shape \(2, 3, 3\)"):
        join_clips([clip(0, 1), clip(1, 2)[0]])
    with pytest.raises(ValueError, match="no clips"):
        join_clips([])


@pytest.mark.parametrize(
    ("size", "wan", "ltx"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((832, 480), (832, 480), (832, 480)),
        ((1000, 600), (1008, 608), (992, 608)),
        ((719, 1281), (720, 1280), (704, 1280)),
        ((5, 7), (16, 16), (32, 32)),
    ],
)
def test_sizes_become_the_nearest_legal_ones(size: tuple[int, int], wan: tuple[int, int], ltx: tuple[int, int]) -> None:
    assert WAN.legal_size(*size) == wan
    assert LTX.legal_size(*size) == ltx


def test_frame_counts_become_the_next_legal_ones() -> None:
    assert [WAN.legal_frames(frames) for frames in (2, 5, 6, 80, 81, 82)] == [5, 5, 9, 81, 81, 85]
    assert [LTX.legal_frames(frames) for frames in (2, 9, 10, 96, 97, 98)] == [9, 9, 17, 97, 97, 105]
