"""Joining clips that meet in a panel, without showing that panel twice. Host-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

SHARED_FRAMES = 1
"""Frames at the end of a clip that the next one begins with again."""


def joined_length(lengths: Sequence[int]) -> int:
    """Return the frames of the joined clip: P transitions of F frames give P * (F - 1) + 1."""
    return sum(lengths) - SHARED_FRAMES * (len(lengths) - 1)


def write_clips(clips: Iterable[Tensor], frames: int) -> Tensor:
    """Return one clip of `frames` frames, written clip by clip as `clips` yields them.

    Of two frames that show the same panel the later clip's stays: a video VAE encodes the first frame of a clip by
    itself, and the last one together with those before it.

    Args:
        clips: (F_i, H, W, C) each; the first frame of each but the first shows the same panel as the last frame of the
            one before.
        frames: `joined_length` of them.

    Returns:
        (frames, H, W, C), on the device and with the dtype of the first clip.
    """
    joined: Tensor | None = None
    position = 0
    for clip in clips:
        if joined is None:
            joined = clip.new_empty(frames, *clip.shape[1:])
        joined[position : position + len(clip)] = clip
        position += len(clip) - SHARED_FRAMES
    if joined is None:
        raise ValueError("There are no clips to join.")
    return joined


def join_clips(clips: Sequence[Tensor]) -> Tensor:
    """Return the clips as one, each shared boundary frame once; see `write_clips`.

    Raises:
        ValueError: no clip; one of another shape; clips of different sizes; among several, a clip too short to have two
            ends.
    """
    for number, clip in enumerate(clips, 1):
        if clip.ndim != 4:
            raise ValueError(
                f"Clip {number} has the shape {tuple(clip.shape)}; it must be [frames, height, width, channels]."
            )
        if clip.shape[1:] != clips[0].shape[1:]:
            raise ValueError(
                f"Clip {number} is {describe(clip)}, but clip 1 is {describe(clips[0])}: clips can only be joined if "
                "they have one size."
            )
        if len(clips) > 1 and len(clip) <= SHARED_FRAMES:
            raise ValueError(
                f"Clip {number} of {len(clips)} has {len(clip)} frame. A clip between two panels has at least "
                f"{SHARED_FRAMES + 1}: its first frame is the one that the clip before ends with."
            )
    return write_clips(clips, joined_length([len(clip) for clip in clips]))


def describe(clip: Tensor) -> str:
    """Return the size of a clip's frames in words."""
    height, width, channels = clip.shape[1:]
    return f"{width} x {height} pixels with {channels} channels"
