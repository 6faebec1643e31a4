"""What an image goes through before any encoder sees it."""

from __future__ import annotations

from torch import Tensor


def square_crop(images: Tensor) -> Tensor:
    """Centre square of images (B, H, W, C) -> (B, S, S, C), S = min(H, W).

    Encoders differ by a pixel in how they resize and crop other shapes; on a square there is nothing to
    differ in.
    """
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]
