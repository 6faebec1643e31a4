"""What the training loop sees of a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.clips import Clip

Draw = Callable[[Clip, torch.Generator], Clip]

Preview = dict[str, list[Image.Image]]
"""Pictures by name. One of several images is a clip."""


class Stage(nn.Module, ABC):
    """A loss with the modules that it trains: those of its parameters that require gradients."""

    fields: tuple[str, ...]
    """What it reads of a `Clip`."""

    draw: Draw
    """Random numbers of one clip's loss, as further entries of it. Runs in the reading processes: small, picklable."""

    @abstractmethod
    def forward(self, batch: Clip) -> Tensor:
        """Loss of each clip, (B,)."""

    @abstractmethod
    def validate(self, batch: Clip) -> dict[str, Tensor]:
        """Named numbers of each clip, (B,) each; `loss` is one of them."""

    @abstractmethod
    def preview(self, clip: Clip) -> Preview:
        """What to look at for one clip (without draws, no batch dimension)."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the trained files, whole or not at all, for use outside training."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def measures(self) -> dict[str, Any]:
        """Sizes that a reader of measurements wants to know."""
        counts = {"trained_parameters": sum(parameter.numel() for parameter in self.trained().values())}
        return counts | {"all_parameters": sum(parameter.numel() for parameter in self.parameters())}


def per_clip_mse(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean squared error of each clip in float32: (B, ...) twice -> (B,)."""
    return (predicted.float() - true.float()).square().flatten(1).mean(dim=1)


def draw_nothing(clip: Clip, generator: torch.Generator) -> Clip:
    """The draws of a loss without chance."""
    return {}
