"""Videos to square clips of a few frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor
from torch.nn import functional as F

from ...images import square_crop

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif"})


class BrokenVideoError(Exception):
    """A video that cannot be used; the message says why."""


@dataclass(frozen=True)
class ClipShape:
    """How clips are cut.

    Args:
        frames: F.
        stride: video frames from one clip frame to the next.
        size: pixels of a side.
        clips_per_video: at most so many, from the start, one after the other.
    """

    frames: int = 16
    stride: int = 4
    size: int = 256
    clips_per_video: int = 4

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("frames", 2), ("stride", 1), ("size", 8), ("clips_per_video", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


@dataclass(frozen=True)
class RawClip:
    """A clip with its name, unique in its set, its caption, and its frames (F, size, size, 3) in [0, 1]."""

    key: str
    caption: str
    frames: Tensor


def list_videos(folder: Path) -> list[str]:
    """Videos below `folder`, as sorted relative names; ValueError when there are none."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if not names:
        raise ValueError(f"There are no videos in {folder}; looked for {sorted(VIDEO_SUFFIXES)}.")
    return names


def open_video(path: Path) -> Any:
    """PyAV's container. Its tags are in any encoding; nobody reads them here, so they must not stop anything."""
    return av.open(str(path), metadata_errors="replace")


def cut_clips(path: Path, shape: ClipShape) -> Iterator[Tensor]:
    """Clips (F, size, size, 3) in [0, 1] of one video.

    Raises:
        BrokenVideoError: it cannot be decoded to its end, or is too short for one clip. Clips that came before stand.
    """
    count = 0
    try:
        with open_video(path) as container:
            frames: list[Tensor] = []
            for index, frame in enumerate(container.decode(video=0)):
                place = index % ((shape.frames - 1) * shape.stride + 1)
                if place % shape.stride == 0:
                    frames.append(_square(frame.to_ndarray(format="rgb24"), shape.size))
                if len(frames) == shape.frames:
                    yield torch.stack(frames)
                    frames, count = [], count + 1
                    if count == shape.clips_per_video:
                        return
    except (av.FFmpegError, IndexError, OSError) as error:  # IndexError: no video stream
        kept = f"; the {count} clips before that are kept" if count else ""
        raise BrokenVideoError(f"cannot be decoded: {error}{kept}") from error
    if count == 0:
        raise BrokenVideoError(f"{len(frames)} frames at every {shape.stride}th, a clip needs {shape.frames}")


def _square(pixels: object, size: int) -> Tensor:
    """(H, W, 3) of 8 bits -> (size, size, 3) in [0, 1]: the centre square, resized."""
    image = square_crop(torch.as_tensor(pixels)[None]).movedim(-1, 1).float() / 255
    if image.shape[-1] != size:
        image = F.interpolate(image, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return image[0].movedim(0, -1)
