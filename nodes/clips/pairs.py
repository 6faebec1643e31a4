"""Panels as first and last frames of clips."""

from __future__ import annotations

import comfy.utils
from torch import Tensor

from ..story.model import Story


def require_panels(images: Tensor, story: Story | None) -> None:
    """ValueError unless `images`, (N, H, W, C), are panels between which clips can be made, those of `story`."""
    if images.ndim != 4 or 0 in images.shape or min(images.shape[1:3]) < 2:  # of one pixel a crop can leave none
        raise ValueError(
            f"images has the shape {tuple(images.shape)}; it must be [panels, height, width, channels], with sides "
            "of 2 pixels or more."
        )
    count = images.shape[0]
    if count < 2:
        raise ValueError(f"images holds {count} panel; a clip needs two. Connect a batch of at least two panels.")
    if story is not None and len(story.panels) != count:
        raise ValueError(
            f"images holds {count} panels, but story has {len(story.panels)}. Connect the story that these panels "
            "were drawn for, or none."
        )


def resize(images: Tensor, width: int, height: int) -> Tensor:
    """The images (N, H, W, C) in another size, cut around the centre to its aspect ratio."""
    if images.shape[1:3] == (height, width):
        return images
    channels_first = images.movedim(-1, 1)
    return comfy.utils.common_upscale(channels_first, width, height, "bilinear", "center").movedim(1, -1)
