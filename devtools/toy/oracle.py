"""Read a picture of the toy world: which scene, who stands where and how, and in which colours.

Every layout that the world can draw is laid over the picture. Under a layout each part's pixels should have one
colour of that part's palette, and the rest should be the scene's background; the layout with the least squared
error is what the picture shows. No learned classifier stands between a picture and its numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .figure import POSES, SIZE, Kind, Part
from .palette import CLOTHES_RGB, HAIR_RGB, INK_RGB, SKIN_RGB, Array
from .scenes import backgrounds
from .world import JITTER, POSE_NAMES, POSITION_NAMES, POSITIONS, SHADE, Actor, Look, part_map

Index = NDArray[np.int64]
_PIXELS = SIZE * SIZE
_HALF = SIZE // 2
_PARTS = tuple(part for part in Part if part != Part.BACKGROUND)


@dataclass(frozen=True)
class Reading:
    """What n pictures show; per figure, the first is the left one, and -1 or NaN stands for "no such figure"."""

    scene: Index  # [n], index into SCENES
    figures: Index  # [n], 1 or 2
    kind: Index  # [n, 2]
    pose: Index  # [n, 2], index into POSE_NAMES
    position: Index  # [n, 2], index into POSITION_NAMES
    hat: Index  # [n, 2], 0 or 1
    colours: Array  # [n, 2, len(Part), 3], mean colour, shading taken off; NaN where there is no such part
    residual: Array  # [n], root of the mean squared error per pixel and channel


@dataclass(frozen=True)
class _Layouts:
    """Ways for one figure to stand: its labels, and the pixels of its parts."""

    labels: Index  # [L, 4]: kind, pose, position, hat
    masks: Array  # [L, parts, pixels], 0 or 1
    background: Array  # [L, pixels]
    columns: slice
    """The columns of the picture that these layouts explain."""


def _layouts(positions: tuple[str, ...], jitter: tuple[int, ...], columns: slice, *, alone: bool) -> _Layouts:
    labels, maps = [], []
    for kind, pose, position, hat, shift in itertools.product(Kind, POSE_NAMES, positions, (False, True), jitter):
        look = Look(kind, hat, hair=0, skin=0, top=0, trousers=0, accent=0)
        maps.append(part_map(Actor(look, POSES[pose], POSITIONS[position] + shift), alone=alone)[:, columns])
        labels.append((kind, POSE_NAMES.index(pose), POSITION_NAMES.index(position), hat))
    stack = np.stack(maps).reshape(len(maps), -1)
    masks = np.stack([stack == part for part in _PARTS], axis=1).astype(np.float32)
    return _Layouts(np.array(labels), masks, (stack == Part.BACKGROUND).astype(np.float32), columns)


@lru_cache(maxsize=1)
def _alone() -> _Layouts:
    return _layouts(POSITION_NAMES, JITTER, slice(0, SIZE), alone=True)


@lru_cache(maxsize=1)
def _pairs() -> tuple[_Layouts, _Layouts]:
    # Two figures keep to their halves of the picture (but for a pixel of a jumper's hand): each can be read alone.
    left = _layouts(("left",), (0,), slice(0, _HALF), alone=False)
    right = _layouts(("right",), (0,), slice(_HALF, SIZE), alone=False)
    return left, right


@lru_cache(maxsize=1)
def _scene_pictures() -> Array:
    return backgrounds().reshape(-1, SIZE, SIZE, 3)


def palette_of(part: Part, kind: Kind) -> Array:
    """The colours that a part may have."""
    if part == Part.HAIR:
        return HAIR_RGB
    if part == Part.INK:
        return INK_RGB
    bare = part in (Part.FACE, Part.HAND) or (kind == Kind.WOMAN and part in (Part.LEFT_LEG, Part.RIGHT_LEG))
    return SKIN_RGB if bare else CLOTHES_RGB


def read_pictures(images: Array) -> Reading:
    """Read pictures [n, 32, 32, 3], sRGB 0 to 1; values a little outside that range are fine."""
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"Pictures have shape {images.shape}; the toy world's have (n, {SIZE}, {SIZE}, 3).")
    batches = [_read_batch(images[first : first + 32].astype(np.float32)) for first in range(0, len(images), 32)]
    return Reading(*(np.concatenate([getattr(b, name) for b in batches]) for name in Reading.__dataclass_fields__))


def _read_batch(images: Array) -> Reading:
    n = np.arange(len(images))
    alone, (left, right) = _alone(), _pairs()
    one, one_colours = _errors(images, alone)  # [n, L, scenes]
    two_left, left_colours = _errors(images, left)
    two_right, right_colours = _errors(images, right)
    one_best, pair_best = one.min(1), two_left.min(1) + two_right.min(1)  # [n, scenes]
    is_pair = pair_best.min(1) < one_best.min(1)
    background = np.where(is_pair, pair_best.argmin(1), one_best.argmin(1))
    error = np.where(is_pair, pair_best.min(1), one_best.min(1))

    which_one = one[n, :, background].argmin(1)
    which_left, which_right = (two[n, :, background].argmin(1) for two in (two_left, two_right))
    first = np.where(is_pair[:, None], left.labels[which_left], alone.labels[which_one])
    second = np.where(is_pair[:, None], right.labels[which_right], -1)
    labels = np.stack([first, second], axis=1)
    pair = is_pair[:, None, None]
    colours = np.stack(
        [
            np.where(pair, left_colours[n, which_left], one_colours[n, which_one]),
            np.where(pair, right_colours[n, which_right], np.nan),
        ],
        axis=1,
    )
    with_background = np.concatenate([np.full_like(colours[:, :, :1], np.nan), colours], axis=2)
    residual = np.sqrt(np.maximum(error, 0) / (_PIXELS * 3))
    kind, pose, position, hat = (labels[..., column] for column in range(4))
    return Reading(background // 2, 1 + is_pair, kind, pose, position, hat, with_background, residual)


def _errors(images: Array, layouts: _Layouts) -> tuple[Array, Array]:
    """Squared error under every layout and background [n, L, backgrounds], and part colours [n, L, parts, 3]."""
    pixels = images[:, :, layouts.columns].reshape(len(images), -1, 3)
    count, parts, size = layouts.masks.shape
    flat = layouts.masks.reshape(count * parts, size)
    area = flat.sum(1).reshape(count, parts)
    sums = np.einsum("mp,npc->nmc", flat, pixels, optimize=True).reshape(len(images), count, parts, 3)
    squares = ((pixels**2).sum(2) @ flat.T).reshape(len(images), count, parts)
    means = np.where(area[..., None] > 0, sums / np.maximum(area, 1)[..., None], np.nan)
    shaded = SHADE[list(_PARTS), None]
    error = np.zeros((len(images), count), dtype=np.float32)
    for index, part in enumerate(_PARTS):
        spread = squares[..., index] - (np.nan_to_num(means[:, :, index]) ** 2).sum(-1) * area[:, index]
        for kind in Kind:
            chosen = (layouts.labels[:, 0] == kind) & (area[:, index] > 0)
            palette = palette_of(part, kind) * SHADE[part]
            apart = ((means[:, :, index][:, chosen, None] - palette) ** 2).sum(-1).min(-1)
            error[:, chosen] += spread[:, chosen] + apart * area[chosen, index]
    scenes = _scene_pictures()[:, :, layouts.columns].reshape(-1, size, 3)
    apart = ((pixels[:, None] - scenes[None]) ** 2).sum(-1)  # [n, backgrounds, pixels]
    behind = np.einsum("nbp,lp->nlb", apart, layouts.background, optimize=True)
    return (error[..., None] + behind).astype(np.float32), (means / shaded).astype(np.float32)
