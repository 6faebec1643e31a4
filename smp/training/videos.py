"""Videos to square clips of a few frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor
from torch.nn import functional as F

from ..images import square_crop

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


def read_captions(table: Path) -> dict[str, str]:
    """Captions by a video's relative name, from a CSV file with the columns `video` and `caption`.

    Raises:
        ValueError: no such file, not UTF-8, or other columns.
    """
    if not table.is_file():
        raise ValueError(f"There is no table of captions at {table}.")
    rows = csv.DictReader(io.StringIO(read_text(table), newline=""))
    if not {"video", "caption"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{table.name} has the columns {rows.fieldnames}; it needs 'video' and 'caption'.")
    return {row["video"]: row["caption"] for row in rows}


def caption_of(folder: Path, name: str, captions: dict[str, str]) -> str:
    """The table's caption, or else the text file beside the video, or else none: ''.

    Raises:
        BrokenVideoError: the text file is not UTF-8.
    """
    if name in captions:
        return captions[name].strip()
    text = (folder / name).with_suffix(".txt")
    try:
        return read_text(text).strip() if text.is_file() else ""
    except ValueError as error:
        raise BrokenVideoError(f"its caption {error}") from error


def read_text(path: Path) -> str:
    """A text file's content; ValueError, with the name and the place, when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise ValueError(f"{path.name} is not UTF-8: {wrong}") from error


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
