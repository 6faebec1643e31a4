"""How good a drawn transition of the toy world is, against the true clip.

Pixels, place and colours are read without a learned judge; what lies in embedding space, with the toy world's encoder.
Only the frames between the two given ones count, unless a measure says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...devtools.toy.animation import Moment, Shot, moment, parts_at, picture_of, times
from ...devtools.toy.figure import Kind, Part
from ...devtools.toy.oracle import palette_of
from ...devtools.toy.palette import Array
from ...devtools.toy.vision import encode_pictures
from ...devtools.toy.world import POSITIONS, SHADE
from ...smp.evaluation.clip_scores import Measures, Scores, clip_scores, cosine

PLACES = range(min(POSITIONS.values()) - 2, max(POSITIONS.values()) + 3)
"""Where a drawn figure is looked for: wherever one can stand, and a pixel beyond."""
MOMENTS = 8
"""Times of the true movement at which its pose is looked for."""
SHOWN: dict[str, Part] = {
    "hair": Part.HAIR,
    "skin": Part.FACE,
    "top": Part.TOP,
    "trousers": Part.LEFT_LEG,
    "accent": Part.LEFT_SHOE,
}
"""What must stay as it is through a clip, and the part that shows it."""


@dataclass(frozen=True)
class Encoder:
    """The toy world's CLIP_VISION as the models that measures need."""

    clip_vision: Any

    def embed(self, pictures: Tensor) -> Tensor:
        """(B, 32, 32, 3) -> image embeddings (B, E)."""
        return encode_pictures(self.clip_vision, pictures)[1]

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """LPIPS's formula with this encoder as its trunk: 1 - cosine of each patch's features, averaged; (B,)."""
        features = [encode_pictures(self.clip_vision, pictures)[0][:, 1:] for pictures in (first, second)]
        return (1 - cosine(*features)).mean(dim=1)

    def measures(self) -> Measures:
        return Measures(self.distance, self.embed)


def score(drawn: Array, true: Array, shot: Shot, encoder: Encoder) -> Scores:
    """Measures of one clip, [F, 32, 32, 3] drawn and true.

    - `pixel error`: mean absolute error, 0 to 255.
    - `embedding error`: mean squared error of the frames' embeddings, over that of the frozen clip (its first frame
      again and again), so that 1 is as bad as standing still.
    - `arrival`: pixel error of the last frame but one: a clip that is held to its end can only jump there.
    - `last frame`: pixel error of the last frame, for clips that are not held.
    - `place`: pixels between where the figure stands and where it should.
    - `colours`: share of hair, skin, top, trousers and shoes that have the right colour of the palette.
    - the measures of `clip_scores`, with the toy world's encoder.
    """
    between = slice(1, -1)
    error = 255 * np.abs(drawn - true).mean((1, 2, 3))
    pictures = [torch.from_numpy(np.ascontiguousarray(clip)).float() for clip in (drawn, true)]
    mine, theirs = (encoder.embed(clip) for clip in pictures)
    frozen = (theirs[:1] - theirs)[between].square().mean()
    found = [find_figure(frame, shot, time) for frame, time in zip(drawn, times(len(drawn)), strict=True)]
    return {
        "pixel error": float(error[between].mean()),
        "embedding error": float((mine - theirs)[between].square().mean() / frozen),
        "arrival": float(error[-2]),
        "last frame": float(error[-1]),
        "place": float(np.mean([off for off, _ in found[between]])),
        "colours": float(np.mean([right for _, right in found[between]])),
        **clip_scores(pictures[0], encoder.measures(), pictures[1][-1]),
    }


def find_figure(frame: Array, shot: Shot, time: float) -> tuple[float, float]:
    """How many pixels beside its true place the figure of `frame` stands, and the share of its colours that are right.

    It is where, and in the pose of the movement in which, the true picture would differ least from the frame.
    """
    true = moment(shot, time)
    candidates = list(_candidates(shot, true))
    pictures = np.stack([picture_of(shot, state) for state in candidates])
    state = candidates[int(np.square(pictures - frame).sum((1, 2, 3)).argmin())]
    return abs(state.x - round(true.x)), right_colours(frame, shot, state)


def _candidates(shot: Shot, true: Moment) -> Iterator[Moment]:
    for time in times(MOMENTS):
        pose = moment(shot, time).pose
        for place in PLACES:
            yield replace(true, pose=pose, x=place)


def right_colours(frame: Array, shot: Shot, state: Moment) -> float:
    """Share of the figure's colours that are nearest to the right one of their palette, at the place of `state`."""
    parts = parts_at(shot, state)
    right = []
    for field, part in SHOWN.items():
        inside = parts == part
        if not inside.any() or (field == "trousers" and shot.look.kind == Kind.WOMAN):
            continue
        palette = palette_of(part, shot.look.kind)
        colour = frame[inside].mean(0) / SHADE[part]
        right.append(int(np.square(palette - colour).sum(1).argmin()) == getattr(shot.look, field))
    return float(np.mean(right))
