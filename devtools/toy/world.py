"""Pictures of the toy world: one or two figures before a scene.

A prompt tells the scene and, for each figure, its kind, pose and position. It does not tell the colours or the
hat (unless it describes them, in part): those are free between pictures, and agree within one. A hat has the
shoes' colour, the sleeves the shirt's, and a balloon far from the figure the shirt's again, so that a model can
get it right only by attending across the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .figure import POSES, SIZE, Kind, Part, PartMap, Pose, draw_figure
from .palette import CLOTHES_RGB, HAIR_RGB, INK_RGB, SKIN_RGB, Array
from .scenes import SCENES, backgrounds

POSE_NAMES = tuple(POSES)
POSITIONS: dict[str, int] = {"left": 8, "middle": 16, "right": 24}
POSITION_NAMES = tuple(POSITIONS)
JITTER = (-1, 0, 1)
SLEEVE_SHADE = 0.85
SHADE = np.ones(len(Part), dtype=np.float32)
SHADE[[Part.LEFT_SLEEVE, Part.RIGHT_SLEEVE, Part.RIGHT_LEG]] = SLEEVE_SHADE
"""Brightness of a part relative to its colour; without it an arm in front of the body could not be seen."""


@dataclass(frozen=True)
class Look:
    """What a figure wears: indices into the palettes. A woman's dress is her `top`; she has no trousers."""

    kind: Kind
    hat: bool
    hair: int
    skin: int
    top: int
    trousers: int
    accent: int

    def colours(self) -> Array:
        """Colour of every part, [len(Part), 3]; the background's is unused."""
        top, accent, skin = CLOTHES_RGB[self.top], CLOTHES_RGB[self.accent], SKIN_RGB[self.skin]
        legs = CLOTHES_RGB[self.trousers] if self.kind == Kind.MAN else skin
        table = {
            Part.HAT: accent,
            Part.HAIR: HAIR_RGB[self.hair],
            Part.FACE: skin,
            Part.HAND: skin,
            Part.TOP: top,
            Part.LEFT_SLEEVE: top,
            Part.RIGHT_SLEEVE: top,
            Part.LEFT_LEG: legs,
            Part.RIGHT_LEG: legs,
            Part.LEFT_SHOE: accent,
            Part.RIGHT_SHOE: accent,
            Part.BALLOON: top,
            Part.INK: INK_RGB[0],
        }
        colours = np.zeros((len(Part), 3), dtype=np.float32)
        for part, colour in table.items():
            colours[part] = colour * SHADE[part]
        return colours


@dataclass(frozen=True)
class Actor:
    """A figure in a picture: what it wears, what it does, and where its feet stand (pixels)."""

    look: Look
    pose: Pose
    x: float


@dataclass(frozen=True)
class Picture:
    """One picture. Two actors stand left and right, in this order, and fly no balloon."""

    scene: int
    mirrored: bool
    actors: tuple[Actor, ...]


@lru_cache(maxsize=1)
def _backgrounds() -> Array:
    return backgrounds()


@lru_cache(maxsize=4)
def _balloon(x: float) -> PartMap:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    parts = np.zeros((SIZE, SIZE), dtype=np.int64)
    parts[(abs(columns - x) < 1) & (rows > 6) & (rows < 12)] = Part.INK
    parts[np.hypot(columns + 0.5 - x, (rows + 0.5 - 5) * 0.85) < 2.9] = Part.BALLOON
    return parts


def balloon_x(x: float) -> float:
    """The balloon flies on the side that the figure leaves free."""
    return 4 if x > (POSITIONS["middle"] + POSITIONS["right"]) / 2 else 28


def part_map(actor: Actor, *, alone: bool) -> PartMap:
    """Which part every pixel belongs to, [32, 32]."""
    figure = draw_figure(actor.look.kind, actor.pose, hat=actor.look.hat, x=actor.x)
    return before_balloon(figure, balloon_x(actor.x)) if alone else figure


def before_balloon(figure: PartMap, x: float) -> PartMap:
    """A figure's parts with its balloon, which flies at `x`, behind them."""
    return np.where(figure == Part.BACKGROUND, _balloon(x), figure)


def background(scene: int, mirrored: bool) -> Array:
    """A scene without anybody, [32, 32, 3]; treat it as read-only."""
    picture: Array = _backgrounds()[scene, int(mirrored)]
    return picture


def paint(image: Array, parts: PartMap, look: Look) -> None:
    """Paint a figure over `image`."""
    inside = parts != Part.BACKGROUND
    image[inside] = look.colours()[parts[inside]]


def render(picture: Picture) -> Array:
    """The picture as sRGB, 0 to 1, [32, 32, 3]. Poses and positions need not be among the named ones."""
    image = background(picture.scene, picture.mirrored).copy()
    for actor in picture.actors:
        paint(image, part_map(actor, alone=len(picture.actors) == 1), actor.look)
    return image


def random_look(rng: np.random.Generator, kind: Kind) -> Look:
    return Look(
        kind=kind,
        hat=bool(rng.integers(2)),
        hair=int(rng.integers(len(HAIR_RGB))),
        skin=int(rng.integers(len(SKIN_RGB))),
        top=int(rng.integers(len(CLOTHES_RGB))),
        trousers=int(rng.integers(len(CLOTHES_RGB))),
        accent=int(rng.integers(len(CLOTHES_RGB))),
    )


@dataclass(frozen=True)
class Direction:
    """What a prompt tells about one figure, by name; None is left open."""

    kind: Kind
    pose: str | None
    position: str | None
    described: tuple[str, ...] = ()
    """Fields of its `Look` that the prompt gives away."""


def stage(
    rng: np.random.Generator, scene: str | None, directions: Sequence[Direction], looks: Sequence[Look]
) -> Picture:
    """A picture that obeys the directions; whatever they leave open is drawn from `rng`."""
    actors = []
    for direction, look in zip(directions, looks, strict=True):
        pose = direction.pose or POSE_NAMES[rng.integers(len(POSE_NAMES))]
        position = direction.position or POSITION_NAMES[rng.integers(len(POSITION_NAMES))]
        jitter = JITTER[rng.integers(len(JITTER))] if len(directions) == 1 else 0
        actors.append(Actor(look, POSES[pose], POSITIONS[position] + jitter))
    index = SCENES.index(scene) if scene else int(rng.integers(len(SCENES)))
    return Picture(index, bool(rng.integers(2)), tuple(actors))


def random_directions(rng: np.random.Generator, figures: int) -> tuple[str | None, list[Direction]]:
    """A scene and one direction per figure; scene, pose and a lone figure's position are told nine times in ten."""

    def choose(names: Sequence[str]) -> str | None:
        return names[int(rng.integers(len(names)))] if rng.random() < 0.9 else None

    together = figures > 1 and rng.random() < 0.4
    pose = choose(POSE_NAMES)
    directions = []
    for index in range(figures):
        kind = Kind(int(rng.integers(2)))
        if index and not together:
            pose = choose(POSE_NAMES)
        position = ("left", "right")[index] if figures > 1 else choose(POSITION_NAMES)
        directions.append(Direction(kind, pose, position, _described(rng, kind)))
    return choose(SCENES), directions


def _described(rng: np.random.Generator, kind: Kind) -> tuple[str, ...]:
    fields = ["hat", "hair", "top", "accent"] + (["trousers"] if kind == Kind.MAN else [])
    count = int(rng.choice(3, p=[0.4, 0.4, 0.2]))
    return tuple(str(field) for field in rng.permutation(fields)[:count])


def random_example(rng: np.random.Generator) -> tuple[str | None, list[Direction], list[Look], Picture]:
    """A scene, directions and looks to caption, with a picture that shows them; one in four has two figures."""
    scene, directions = random_directions(rng, 2 if rng.random() < 0.25 else 1)
    looks = [random_look(rng, direction.kind) for direction in directions]
    # A prompt names a hat only on a figure that wears one.
    looks = [replace(a, hat=True) if "hat" in d.described else a for a, d in zip(looks, directions, strict=True)]
    return scene, directions, looks, stage(rng, scene, directions, looks)
