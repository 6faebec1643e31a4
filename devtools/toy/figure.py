"""A pixel-art figure: joints to a map of body parts. Any point between two poses can be drawn as well.

Coordinates are pixels of the 32 x 32 picture, x to the right, y down; a figure's own frame has its origin on the
ground between its feet.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 32
PartMap = NDArray[np.int64]


class Part(IntEnum):
    """What a pixel belongs to. Parts of one figure are told apart where attention has to agree on a colour."""

    BACKGROUND = 0
    HAT = 1
    HAIR = 2
    FACE = 3
    HAND = 4
    TOP = 5
    LEFT_SLEEVE = 6
    RIGHT_SLEEVE = 7
    LEFT_LEG = 8
    RIGHT_LEG = 9
    LEFT_SHOE = 10
    RIGHT_SHOE = 11
    BALLOON = 12
    INK = 13


class Kind(IntEnum):
    """The two kinds of figure: trousers and short hair, dress and long hair."""

    MAN = 0
    WOMAN = 1


class Pose(NamedTuple):
    """Joint positions in pixels: hands from their shoulder, feet from their hip (y down), lift off the ground."""

    left_hand: tuple[float, float]
    right_hand: tuple[float, float]
    left_foot: tuple[float, float] = (-0.5, 8)
    right_foot: tuple[float, float] = (0.5, 8)
    lift: float = 0


POSES: dict[str, Pose] = {
    "standing": Pose((-1, 6), (1, 6)),
    "waving": Pose((-1, 6), (2.6, -6.5)),
    "cheering": Pose((-2.6, -6.5), (2.6, -6.5)),
    "walking": Pose((-2.5, 4), (2.5, 4), (-3.5, 8), (3.5, 8)),
    "jumping": Pose((-3.5, 0), (3.5, 0), (-3, 5), (3, 5), 3),
}


def blend(start: Pose, end: Pose, amount: float) -> Pose:
    """The pose `amount` (0 to 1) of the way from `start` to `end`, joint by joint."""

    def between(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
        return a[0] + (b[0] - a[0]) * amount, a[1] + (b[1] - a[1]) * amount

    return Pose(
        between(start.left_hand, end.left_hand),
        between(start.right_hand, end.right_hand),
        between(start.left_foot, end.left_foot),
        between(start.right_foot, end.right_foot),
        start.lift + (end.lift - start.lift) * amount,
    )


class _Canvas:
    """Paints parts into a map; later paint covers earlier paint. Pixel centres lie at half-integers."""

    def __init__(self, x: float, y: float) -> None:
        self.map: PartMap = np.zeros((SIZE, SIZE), dtype=np.int64)
        rows, columns = np.mgrid[:SIZE, :SIZE]
        self.x, self.y = columns + 0.5 - round(x), rows + 0.5 - round(y)

    def box(self, part: Part, left: float, right: float, top: float, bottom: float) -> None:
        inside = (self.x > left) & (self.x < right) & (self.y > top) & (self.y < bottom)
        self.map[inside] = part

    def limb(self, part: Part, start: tuple[float, float], end: tuple[float, float], width: float) -> None:
        (ax, ay), (bx, by) = start, end
        length = max((bx - ax) ** 2 + (by - ay) ** 2, 1e-6)
        along = np.clip(((self.x - ax) * (bx - ax) + (self.y - ay) * (by - ay)) / length, 0, 1)
        distance = np.hypot(self.x - ax - along * (bx - ax), self.y - ay - along * (by - ay))
        self.map[distance < width / 2] = part


@lru_cache(maxsize=4096)
def draw_figure(kind: Kind, pose: Pose, *, hat: bool, x: float, ground: float = SIZE) -> PartMap:
    """Body parts of one figure as a [32, 32] map of `Part`. Treat it as read-only: it is cached."""
    canvas = _Canvas(x, ground - pose.lift)
    _legs(canvas, kind, pose)
    _body(canvas, kind)
    if kind == Kind.WOMAN:  # long hair falls behind the arms, over the dress
        canvas.box(Part.HAIR, -6, 6, -25, -14)
        canvas.box(Part.TOP, -3, 3, -16, -13)
    _arms(canvas, pose)
    _head(canvas, kind)
    if hat:
        canvas.box(Part.HAT, -4, 4, -28, -25)
        canvas.box(Part.HAT, -6, 6, -25, -23)
    canvas.map.flags.writeable = False
    return canvas.map


def _legs(canvas: _Canvas, kind: Kind, pose: Pose) -> None:
    sides = (
        (-1, pose.left_foot, Part.LEFT_LEG, Part.LEFT_SHOE),
        (1, pose.right_foot, Part.RIGHT_LEG, Part.RIGHT_SHOE),
    )
    width = 3.2 if kind == Kind.MAN else 2.2
    for side, (dx, dy), leg, shoe in sides:
        hip, foot = (side * 2.0, -9.5), (side * 2.0 + dx, -9.5 + dy)
        canvas.limb(leg, hip, (foot[0], foot[1] - 0.5), width)
        # Shoes point outwards, so that the two never merge.
        inner, outer = foot[0] - side * 1.5, foot[0] + side * 2.5
        canvas.box(shoe, min(inner, outer), max(inner, outer), foot[1] - 0.6, foot[1] + 1.6)


def _body(canvas: _Canvas, kind: Kind) -> None:
    canvas.box(Part.TOP, -4, 4, -16, -9)
    if kind == Kind.MAN:
        canvas.box(Part.LEFT_LEG, -4, 0, -10, -8)
        canvas.box(Part.RIGHT_LEG, 0, 4, -10, -8)
    else:
        canvas.box(Part.TOP, -5, 5, -10, -7)
        canvas.box(Part.TOP, -6, 6, -7, -5)


def _arms(canvas: _Canvas, pose: Pose) -> None:
    sides = ((-1, pose.left_hand, Part.LEFT_SLEEVE), (1, pose.right_hand, Part.RIGHT_SLEEVE))
    for side, (dx, dy), sleeve in sides:
        shoulder = (side * 4.6, -14.6)
        hand = (shoulder[0] + dx, shoulder[1] + dy)
        canvas.limb(sleeve, shoulder, hand, 2.3)
        canvas.limb(Part.HAND, hand, hand, 2.3)


def _head(canvas: _Canvas, kind: Kind) -> None:
    canvas.box(Part.HAIR, -5, 5, -25, -18)
    canvas.box(Part.FACE, -4, 4, -21, -16)
    canvas.box(Part.HAIR, -4, 0 if kind == Kind.WOMAN else 1, -22, -20)
    for side in (-1, 1):
        canvas.box(Part.INK, side * 2 - 0.6, side * 2 + 0.6, -20, -18)
