"""Measures of one clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Scores = dict[str, float]

Distance = Callable[[Tensor, Tensor], Tensor]
"""Images (N, H, W, 3) in [0, 1] twice -> distance of each pair, (N,)."""

Embed = Callable[[Tensor], Tensor]
"""Images (N, H, W, 3) in [0, 1] -> embeddings (N, E)."""


@dataclass(frozen=True)
class Measures:
    """The models that measures need; what is None is not measured."""

    lpips: Distance | None = None
    embed: Embed | None = None


def clip_scores(frames: Tensor, measures: Measures, end: Tensor | None = None, *, ends_held: bool = False) -> Scores:
    """Measures of one clip.

    - `LPIPS-first`, `CLIPSIM-first`: mean of the measure between frame 1 and frame i, i > 1 (the paper's).
    - `LPIPS-frames`, `CLIPSIM-frames`: mean over neighbouring frames (the paper's).
    - `LPIPS-last`, `CLIPSIM-last`: between the given end picture and the last frame: did the clip arrive?
    - `LPIPS-arrival`, `CLIPSIM-arrival`: instead of -last where the ends are held, and the last frame therefore is the
      end picture: between it and the last frame but one, the last that is drawn. A clip that is late jumps there.
    - `motion`: mean absolute difference of neighbouring frames' pixels. A frozen clip has the best values above but
      for -last and -arrival, and 0 here.

    Args:
        frames: (F, H, W, 3) in [0, 1], at least 2, held ones among them.
        measures: the models.
        end: (H, W, 3), the picture that the clip should end on; without it there is neither -last nor -arrival.
        ends_held: the first and last frame were given, not drawn.

    Raises:
        ValueError: fewer than two frames, or none between held ends; an end picture of another size.
    """
    if frames.ndim != 4 or frames.shape[0] < 2:
        raise ValueError(f"A clip must be (frames, height, width, 3) with 2 frames or more; got {tuple(frames.shape)}.")
    if end is not None and end.shape != frames.shape[1:]:
        raise ValueError(f"The end picture is {tuple(end.shape)}, the clip's frames are {tuple(frames.shape[1:])}.")
    if ends_held and frames.shape[0] < 3:
        raise ValueError("A clip of 2 frames whose ends are held has none that is drawn.")
    reached = ("arrival", -2) if ends_held else ("last", -1)
    scores: Scores = {}
    if measures.lpips is not None:
        scores |= _of_pairs("LPIPS", measures.lpips, frames, end, reached)
    if measures.embed is not None:
        pictures = frames if end is None else torch.cat([frames, end[None]])
        embeds = measures.embed(pictures)
        last = None if end is None else embeds[-1]
        scores |= _of_pairs("CLIPSIM", cosine, embeds[: len(frames)], last, reached)
    return scores | {"motion": float((frames[1:] - frames[:-1]).abs().mean())}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of rows: (N, E) twice -> (N,)."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def _of_pairs(name: str, measure: Distance, items: Tensor, end: Tensor | None, reached: tuple[str, int]) -> Scores:
    """`reached`: what the comparison with the end is called, and which item it is made with."""
    first = measure(items[:1].expand_as(items[1:]), items[1:])
    scores = {f"{name}-first": float(first.mean()), f"{name}-frames": float(measure(items[:-1], items[1:]).mean())}
    if end is not None:
        label, place = reached
        scores[f"{name}-{label}"] = float(measure(end[None], items[place][None]))
    return scores
