"""The six scenes a figure can stand before: 32 x 32 pictures, each also mirrored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .figure import SIZE
from .palette import Array, rgb

Y, X = np.mgrid[:SIZE, :SIZE]
Mask = np.ndarray


def _paint(image: Array, where: Mask, *colour: int) -> None:
    image[where] = rgb(*colour)[0]


def _sky(*bands: tuple[int, int, int, int]) -> Array:
    """Horizontal bands (first row, red, green, blue), top to bottom."""
    image = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    for top, *colour in bands:
        _paint(image, top <= Y, *colour)
    return image


def _disc(x: float, y: float, radius: float) -> Mask:
    return np.hypot(X - x, Y - y) < radius


def _sea() -> Array:
    image = _sky((0, 120, 200, 240), (6, 160, 218, 245), (12, 200, 234, 248), (15, 25, 110, 165), (21, 20, 90, 145))
    _paint(image, (Y == 17) & (X % 8 < 3) | (Y == 20) & ((X + 4) % 8 < 3), 120, 190, 215)
    _paint(image, (Y == 23) & ((X + 1) % 9 < 3), 120, 190, 215)
    _paint(image, (Y >= 26) | (Y == 25) & (X % 10 < 6), 235, 205, 145)
    return image


def _forest() -> Array:
    image = _sky((0, 175, 215, 185), (25, 85, 135, 60), (29, 70, 115, 52))
    for x, top in ((2, 3), (11, 1), (21, 2), (30, 4)):
        _paint(image, (abs(X - x) <= 1) & (Y > 14) & (Y < 26), 92, 62, 40)
        for tier in range(3):
            y0 = top + 6 * tier
            _paint(
                image,
                (y0 <= Y) & (y0 + 8 > Y) & (abs(X - x) <= (Y - y0) * 0.6 + tier * 0.7),
                38,
                98 - 9 * tier,
                58,
            )
    return image


def _city() -> Array:
    image = _sky((0, 205, 195, 215), (8, 225, 208, 210), (28, 75, 75, 85))
    heights = (9, 14, 4, 12, 7, 15, 5, 11)
    for index, top in enumerate(heights):
        inside = (index == X // 4) & (top <= Y) & (Y < 28)
        shade = 100 + 14 * (index % 3)
        _paint(image, inside, shade, shade, shade + 18)
        _paint(image, inside & (X % 4 == 1) & ((top + 2) % 3 == Y % 3), 245, 220, 140)
    _paint(image, (Y == 30) & (X % 6 < 3), 160, 160, 160)
    return image


def _desert() -> Array:
    image = _sky((0, 180, 225, 240), (8, 225, 232, 225))
    _paint(image, 18 + 2.5 * np.sin(X * 2 * np.pi / 22) <= Y, 228, 185, 115)
    _paint(image, 24 + 2 * np.sin(X * 2 * np.pi / 30 + 2.2) <= Y, 205, 155, 88)
    for x, top, bottom in ((3, 13, 24), (28, 15, 25)):
        _paint(image, (abs(X - x) <= 0) & (top <= Y) & (bottom > Y), 60, 125, 85)
        _paint(image, (abs(X - x) == 2) & (top + 2 <= Y) & (top + 6 > Y), 60, 125, 85)
        _paint(image, (abs(X - x) == 1) & (top + 5 == Y), 60, 125, 85)
    return image


def _snow() -> Array:
    image = _sky((0, 160, 185, 215), (9, 185, 205, 228))
    for x, top in ((7, 6), (22, 4), (33, 10)):
        _paint(image, (top <= Y) & (Y < 22) & (abs(X - x) <= (Y - top) * 0.75), 120, 135, 165)
        _paint(image, (top <= Y) & (top + 5 > Y) & (abs(X - x) <= (Y - top) * 0.75), 240, 244, 250)
    _paint(image, Y >= 21, 226, 235, 244)
    _paint(image, Y >= 28, 205, 218, 234)
    return image


def _night() -> Array:
    image = _sky((0, 22, 20, 62), (12, 32, 32, 82), (22, 34, 52, 58), (27, 26, 42, 48))
    _paint(image, (X * 7 + Y * 11) % 41 == 3, 235, 230, 180)
    _paint(image, Y >= 22, 34, 52, 58)
    _paint(image, Y >= 27, 26, 42, 48)
    _paint(image, _disc(15.5, 4, 3.2) & ~_disc(17, 3.2, 2.9), 245, 235, 170)
    return image


_PAINTERS: dict[str, Callable[[], Array]] = {
    "sea": _sea,
    "forest": _forest,
    "city": _city,
    "desert": _desert,
    "snow": _snow,
    "night": _night,
}
SCENES = tuple(_PAINTERS)


def backgrounds() -> Array:
    """All pictures, sRGB 0 to 1: [scene (6), plain or mirrored (2), 32, 32, 3]."""
    plain = np.stack([painter() for painter in _PAINTERS.values()])
    return np.stack([plain, plain[:, :, ::-1]], axis=1)
