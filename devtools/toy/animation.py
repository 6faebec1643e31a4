"""The toy world in motion: how a figure gets from one stance to another, and what the camera sees of it.

What happens between two stances follows from them alone, so it can be learned; and it is not what lies halfway
between them: who crosses the picture walks there, who jumps on the spot crouches first, arms swing on arcs, and who
ends as it began has done something in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .figure import POSES, PartMap, Pose, blend, draw_figure
from .palette import Array
from .scenes import SCENES
from .world import (
    JITTER,
    POSE_NAMES,
    POSITION_NAMES,
    POSITIONS,
    Direction,
    Look,
    background,
    balloon_x,
    before_balloon,
    paint,
)

FRAMES = 8
"""Frames of a clip."""
STEP = 4.0
"""Pixels that a figure shifts without walking."""
STRIDE = 12.0
"""Pixels of one walking cycle."""
CROUCH = 2.5
HOP = 4.0
Vector = tuple[float, float]


@dataclass(frozen=True)
class Stance:
    """A named pose, and where the figure's feet stand (pixels)."""

    pose: str
    x: float


@dataclass(frozen=True)
class Shot:
    """One figure on its way from one stance to another, before one background."""

    look: Look
    start: Stance
    end: Stance
    scene: int
    mirrored: bool


@dataclass(frozen=True)
class Moment:
    """What the picture shows at one time of a shot."""

    pose: Pose
    x: float
    balloon: float


def moment(shot: Shot, time: float) -> Moment:
    """The state at `time`, from 0 (start) to 1 (end)."""
    eased = _ease(time)
    way = shot.end.x - shot.start.x
    if abs(way) > STEP:
        pose = _swing(POSES[shot.start.pose], POSES[shot.end.pose], eased)
        pose = blend(pose, _stride(abs(way) * eased / STRIDE), min(1.0, 4 * time, 4 * (1 - time)))
    elif shot.start.pose == shot.end.pose:
        pose = _act(shot.start.pose, time)
    else:
        pose = _change(shot.start.pose, shot.end.pose, time)
    flown = balloon_x(shot.end.x) - balloon_x(shot.start.x)
    return Moment(pose, shot.start.x + way * eased, balloon_x(shot.start.x) + flown * eased)


def parts_at(shot: Shot, state: Moment) -> PartMap:
    """Which part every pixel belongs to, [32, 32]."""
    figure = draw_figure(shot.look.kind, state.pose, hat=shot.look.hat, x=state.x)
    return before_balloon(figure, state.balloon)


def picture_of(shot: Shot, state: Moment) -> Array:
    """The picture, sRGB 0 to 1, [32, 32, 3]."""
    image = background(shot.scene, shot.mirrored).copy()
    paint(image, parts_at(shot, state), shot.look)
    return image


def times(frames: int) -> list[float]:
    """Times of a clip's frames, both ends among them."""
    return [index / (frames - 1) for index in range(frames)]


def film(shot: Shot, frames: int) -> Array:
    """The clip, [frames, 32, 32, 3]."""
    return np.stack([picture_of(shot, moment(shot, time)) for time in times(frames)])


def random_stance(rng: np.random.Generator) -> Stance:
    """Any pose at any place."""
    x = POSITIONS[POSITION_NAMES[rng.integers(len(POSITION_NAMES))]] + JITTER[rng.integers(len(JITTER))]
    return Stance(POSE_NAMES[rng.integers(len(POSE_NAMES))], x)


def random_shot(rng: np.random.Generator, look: Look) -> Shot:
    """Any two stances, before any background."""
    return Shot(look, random_stance(rng), random_stance(rng), int(rng.integers(len(SCENES))), bool(rng.integers(2)))


def directions(shot: Shot, described: Sequence[str] = ()) -> tuple[Direction, Direction]:
    """What a prompt for each end tells."""
    start, end = (
        Direction(shot.look.kind, stance.pose, nearest_position(stance.x), tuple(described))
        for stance in (shot.start, shot.end)
    )
    return start, end


def nearest_position(x: float) -> str:
    """Name of the position that `x` belongs to."""
    return min(POSITIONS, key=lambda name: abs(POSITIONS[name] - x))


def stances_of(shot: Shot) -> list[tuple[str, str]]:
    """Which way between named stances a shot is: pose and position at its start and at its end."""
    return [(stance.pose, nearest_position(stance.x)) for stance in (shot.start, shot.end)]


def _ease(time: float) -> float:
    return time * time * (3 - 2 * time)


def _swing(start: Pose, end: Pose, amount: float) -> Pose:
    """As `blend`, but hands go round their shoulder on the outer side."""
    return blend(start, end, amount)._replace(
        left_hand=_round(start.left_hand, end.left_hand, amount, side=-1),
        right_hand=_round(start.right_hand, end.right_hand, amount, side=1),
    )


def _round(start: Vector, end: Vector, amount: float, *, side: int) -> Vector:
    angles, radii = zip(*((math.atan2(side * x, y), math.hypot(x, y)) for x, y in (start, end)), strict=True)
    angle = angles[0] + (angles[1] - angles[0]) * amount
    radius = radii[0] + (radii[1] - radii[0]) * amount
    return side * radius * math.sin(angle), radius * math.cos(angle)


def _stride(cycles: float) -> Pose:
    """Walking, after so many cycles: legs open and close, one foot after the other leaves the ground."""
    phase = 2 * math.pi * cycles
    open_, lifted = (1 - math.cos(phase)) / 2, math.sin(phase)
    return Pose(
        (-1 - 2 * open_, 6 - 2 * open_),
        (1 + 2 * open_, 6 - 2 * open_),
        (-0.5 - 3 * open_, 8 - 2 * max(0.0, lifted)),
        (0.5 + 3 * open_, 8 - 2 * max(0.0, -lifted)),
    )


def _crouched(pose: Pose, depth: float) -> Pose:
    """Knees bent by `depth` (0 to 1), feet where they were."""
    down = CROUCH * depth
    (left_x, left_y), (right_x, right_y) = pose.left_foot, pose.right_foot
    return pose._replace(left_foot=(left_x, left_y - down), right_foot=(right_x, right_y - down), lift=pose.lift - down)


def _hop(pose: Pose, time: float) -> Pose:
    """Crouch, leap, land."""
    if time < 0.25 or time > 0.75:
        return _crouched(pose, math.sin(math.pi * (time % 0.75) / 0.25))
    return pose._replace(lift=pose.lift + HOP * math.sin(math.pi * (time - 0.25) / 0.5))


def _act(pose_name: str, time: float) -> Pose:
    """What a figure does that ends in the pose it began in."""
    pose = POSES[pose_name]
    there_and_back = math.sin(math.pi * time)
    if pose_name == "waving":
        x, y = pose.right_hand
        return pose._replace(right_hand=(x - 5.2 * there_and_back, y))
    if pose_name == "walking":
        return _swing(pose, _stride(0.5 + time), there_and_back)
    if pose_name == "jumping":
        return _crouched(blend(pose, POSES["standing"], there_and_back), there_and_back)
    return _hop(pose, time)


def _change(start: str, end: str, time: float) -> Pose:
    """From one pose to another on the spot; into and out of a jump through a crouch."""
    if start == "jumping":
        return _change(end, start, 1 - time)
    pose = _swing(POSES[start], POSES[end], _ease(time))
    if end == "jumping":
        pose = _crouched(pose, math.sin(math.pi * min(1.0, time / 0.6)))
    return pose
