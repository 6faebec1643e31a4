"""A picture of clips' ways through a high-dimensional space."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw
from torch import Tensor

COLOURS = ("black", "gray", "red", "blue")
SIZE, MARGIN = 480, 40


def draw_paths(paths: Mapping[str, Tensor]) -> Image.Image:
    """Paths (F, D) in the plane in which the first of them varies most; a dot for each frame, a ring at the start.

    Args:
        paths: at most four, by name.
    """
    first = next(iter(paths.values()))
    centre = first.mean(dim=0)
    plane = torch.linalg.svd(first - centre, full_matrices=False).Vh[:2]  # (2, D), principal axes
    flat = {name: (path - centre) @ plane.T for name, path in paths.items()}
    every = torch.cat(list(flat.values()))
    low = every.min(dim=0).values
    scale = (SIZE - 2 * MARGIN) / (every.max(dim=0).values - low).max().clamp(min=1e-12)
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    for row, (colour, (name, points)) in enumerate(zip(COLOURS, flat.items(), strict=False)):
        places = [(float(x) + MARGIN, float(y) + MARGIN) for x, y in (points - low) * scale]
        pen.line(places, fill=colour, width=2)
        for x, y in places:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        x, y = places[0]
        pen.ellipse((x - 7, y - 7, x + 7, y + 7), outline=colour, width=2)
        pen.text((8, 8 + 12 * row), name, fill=colour)
    return image
