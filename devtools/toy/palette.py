"""The toy world's colours (sRGB, 0 to 1), with the words that name them in a prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def rgb(*values: int) -> Array:
    """8-bit values to an array of their shape / 3 colours, 0 to 1."""
    return np.array(values, dtype=np.float32).reshape(-1, 3) / np.float32(255)


# Well apart from each other and from every scene, so that a colour read off a picture names itself.
CLOTHES: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 42),
    "orange": (245, 140, 25),
    "yellow": (250, 225, 60),
    "green": (40, 160, 65),
    "blue": (45, 90, 225),
    "purple": (145, 60, 190),
    "white": (248, 248, 248),
    "pink": (245, 130, 190),
}
HAIR: dict[str, tuple[int, int, int]] = {
    "black": (35, 28, 32),
    "brown": (120, 70, 35),
    "blond": (240, 200, 95),
    "ginger": (205, 85, 30),
    "grey": (165, 165, 175),
}
# Skin is never in a prompt.
SKIN: tuple[tuple[int, int, int], ...] = ((252, 217, 188), (226, 172, 128), (166, 112, 72), (98, 64, 44))
INK = (28, 24, 38)

CLOTHES_RGB = rgb(*(value for colour in CLOTHES.values() for value in colour))
HAIR_RGB = rgb(*(value for colour in HAIR.values() for value in colour))
SKIN_RGB = rgb(*(value for colour in SKIN for value in colour))
INK_RGB = rgb(*INK)
