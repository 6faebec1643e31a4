"""Frames as images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def frame_images(pixels: Tensor) -> list[Image.Image]:
    """(F, H, W, 3) in [0, 1] -> images."""
    levels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(frame)) for frame in levels]
