"""The benchmark's rows, and whether the predictor wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...devtools.toy.animation import FRAMES, Shot, film
from ...devtools.toy.clips import take
from ...devtools.toy.palette import Array
from ...smp.evaluation.clip_scores import Scores
from ...smp.evaluation.report import mean_of
from .drawing import Animator, Way
from .metrics import Encoder, score

SMP = Way("SMP")
LINEAR = Way("linear interpolation", "interpolated")
ALONE = Way("motion module alone", "blank")
OWN = Way("frames' own embeddings", "own")
FREE = tuple(replace(way, name=f"{way.name}, ends free", anchor="off") for way in (SMP, LINEAR, ALONE))
TRUE, FROZEN, FADED = "true clip", "frozen start", "cross-fade of the panels"
RENDERED: dict[str, Callable[[Array], NDArray[np.floating[Any]]]] = {
    TRUE: lambda true: true,
    FROZEN: lambda true: np.repeat(true[:1], len(true), axis=0),
    FADED: lambda true: true[:1] + (true[-1:] - true[:1]) * np.linspace(0, 1, len(true))[:, None, None, None],
}
COLUMNS = {
    "pixel error": ".1f",
    "embedding error": ".3f",
    "arrival": ".1f",
    "last frame": ".1f",
    "place": ".2f",
    "colours": ".2f",
    "LPIPS-first": ".3f",
    "LPIPS-frames": ".3f",
    "LPIPS-last": ".3f",
    "CLIPSIM-first": ".3f",
    "CLIPSIM-frames": ".3f",
    "CLIPSIM-last": ".3f",
    "motion": ".3f",
}
WON = ("pixel error", "embedding error")
"""What the predictor must be better at than interpolation."""
Rows = dict[str, list[Scores]]


def held_out_shots(count: int, seed: int) -> list[Shot]:
    """Shots whose way from stance to stance is in no training clip."""
    return [take("held out", number, seed).shot for number in range(count)]


def draw_all(animator: Animator, shots: Sequence[Shot], ways: Sequence[Way]) -> tuple[Rows, dict[str, list[Array]]]:
    """Scores and clips of every row."""
    encoder = Encoder(animator.clip_vision)
    rows: Rows = {}
    clips: dict[str, list[Array]] = {}
    for number, shot in enumerate(shots):
        true = film(shot, FRAMES)
        drawn = {name: make(true).astype(np.float32) for name, make in RENDERED.items()}
        drawn |= {way.name: animator.draw(shot, way, seed=number) for way in ways}
        for name, clip in drawn.items():
            rows.setdefault(name, []).append(score(clip, true, shot, encoder))
            clips.setdefault(name, []).append(clip)
        print(f"{number + 1} of {len(shots)}", flush=True)
    return rows, clips


def as_markdown(rows: Rows) -> str:
    """Means with standard errors."""
    lines = ["| frames between the panels | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, scores in rows.items():
        cells = []
        for column, spec in COLUMNS.items():
            figure = mean_of([entry[column] for entry in scores])
            cells.append(f"{figure.mean:{spec}} ± {figure.error:{spec}}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def advantage(rows: Rows, column: str, over: str) -> tuple[float, float]:
    """By how much the SMP is lower in `column` than the row `over`, clip by clip: mean and standard error."""
    figure = mean_of([b[column] - a[column] for a, b in zip(rows[SMP.name], rows[over], strict=True)])
    return figure.mean, figure.error


def failures(rows: Rows) -> list[str]:
    """What the predictor doesn't win, in sentences; empty when it wins."""
    wrong = []
    for column in WON:
        gain, error = advantage(rows, column, LINEAR.name)
        if not gain > 2 * error:  # NaN is no win
            wrong.append(f"{column}: the SMP is better by {gain:.4f} ± {error:.4f} only")
    moved = mean_of([entry["motion"] for entry in rows[SMP.name]]).mean
    real = mean_of([entry["motion"] for entry in rows[TRUE]]).mean
    if not moved >= real / 2:
        wrong.append(f"motion: {moved:.3f}, less than half of the true clips' {real:.3f}")
    return wrong


def film_strips(clips: dict[str, list[Array]], names: Sequence[str], count: int = 6, enlarged: int = 3) -> Image.Image:
    """A block of rows per shot: its clip by each of `names`, frame beside frame."""
    blocks = []
    for number in range(min(count, len(clips[names[0]]))):
        rows = [np.concatenate(list(clips[name][number]), axis=1) for name in names]
        blocks += [*rows, np.ones((3, rows[0].shape[1], 3), dtype=np.float32)]
    sheet = np.concatenate(blocks[:-1]).clip(0, 1).repeat(enlarged, 0).repeat(enlarged, 1)
    return Image.fromarray((sheet * 255).round().astype(np.uint8))
