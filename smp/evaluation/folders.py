"""Scores of videos and of panels that lie in folders."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..training.data.captions import read_text
from ..training.data.videos import list_videos, open_video
from .clip_scores import Measures, Scores, clip_scores
from .image_scores import character_scores, pose_distance
from .models import CLIPScorer
from .poses import PoseReader

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def score_videos(folder: Path, measures: Measures, size: int) -> tuple[list[Scores], dict[str, str]]:
    """Scores of every video below a folder, and the broken ones with the reason.

    Args:
        folder: videos; `NAME.png` beside `NAME.mp4` is the picture that it should end on.
        measures: the models.
        size: frames are resized so that their shorter side has so many pixels; LPIPS depends on it.
    """
    rows, broken = [], {}
    for name in list_videos(folder):
        path = folder / name
        end = path.with_suffix(".png")
        try:
            frames = read_video(path, size)
            last = _resized(read_image(end)[None], frames.shape[1:3])[0] if end.is_file() else None
            rows.append(clip_scores(frames, measures, last))
        except (av.FFmpegError, ValueError, IndexError, OSError) as error:
            broken[name] = str(error)
    return rows, broken


@dataclass
class LeftOut:
    """What does not enter pose diversity: panels without a person, and pairs that show too few of the same joints."""

    panels: int = 0
    pairs: int = 0


def score_characters(folder: Path, clip: CLIPScorer, poses: PoseReader | None) -> tuple[dict[str, Scores], LeftOut]:
    """Scores of every character, and how many panels and pairs were left out of pose diversity.

    Args:
        folder: a folder for each character, with its panels and the prompt of `NAME.png` in `NAME.txt`.
        clip: the model.
        poses: finds keypoints, or None: no pose diversity.

    Raises:
        ValueError: no characters, fewer than two panels, or panels with and without prompts mixed.
    """
    characters = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not characters:
        raise ValueError(f"{folder} has no folders; it must hold one for each character.")
    scores, left = {}, LeftOut()
    for character in characters:
        panels = sorted(path for path in character.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        images = [read_image(panel) for panel in panels]
        distances = [] if poses is None else _pose_distances(images, poses, left)
        try:
            embeds = torch.cat([clip.embed(image[None]) for image in images]) if images else torch.zeros(0, 1)
            scores[character.name] = character_scores(embeds, _embed_prompts(panels, clip), distances)
        except ValueError as error:
            raise ValueError(f"Character {character.name}: {error}") from error
    return scores, left


def _pose_distances(images: list[Tensor], poses: PoseReader, left: LeftOut) -> list[float]:
    found = [poses.read(image) for image in images]
    seen = [pose for pose in found if pose is not None]
    distances = [pose_distance(a, b) for a, b in combinations(seen, 2)]
    left.panels += len(found) - len(seen)
    left.pairs += distances.count(None)
    return [distance for distance in distances if distance is not None]


def _embed_prompts(panels: list[Path], clip: CLIPScorer) -> Tensor | None:
    texts = [path.with_suffix(".txt") for path in panels]
    missing = [path.name for path in texts if not path.is_file()]
    if missing and len(missing) < len(texts):
        raise ValueError(f"Some panels have a prompt and some have none; missing: {missing[:3]}.")
    return None if missing else clip.embed_texts([read_text(path).strip() for path in texts])


def read_video(path: Path, size: int) -> Tensor:
    """All frames, (F, H, W, 3) in [0, 1], the shorter side `size` pixels."""
    frames = []
    with open_video(path) as container:
        for frame in container.decode(video=0):  # resized one by one: a minute of 1080p at full size is 11 GB
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))[None].float() / 255
            scale = size / min(frame.height, frame.width)
            frames.append(_resized(pixels, (round(frame.height * scale), round(frame.width * scale))))
    if not frames:
        raise ValueError("it has no frames.")
    return torch.cat(frames)


def read_image(path: Path) -> Tensor:
    """(H, W, 3) in [0, 1]; what is transparent is white."""
    image = Image.open(path).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return torch.from_numpy(np.asarray(flat).copy()).float() / 255


def _resized(images: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
    if tuple(images.shape[1:3]) == tuple(shape):
        return images
    resized = F.interpolate(images.movedim(-1, 1), size=tuple(shape), mode="bicubic", antialias=True)
    return resized.clamp(0, 1).movedim(1, -1)
