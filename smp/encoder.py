"""Frames -> OpenCLIP ViT features (equation 4), for training and measuring outside the host.

In the host, its own CLIP_VISION gives the same numbers within fp16 rounding on square images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.factory import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from .images import square_crop

PAPER_MODEL = "ViT-H-14"


@dataclass(frozen=True)
class EncodedImages:
    """Encoder output: `image_embeds` (B, E), never normalised, and penultimate `hidden_states` (B, T, W)."""

    image_embeds: Tensor
    hidden_states: Tensor


class OpenCLIPEncoder(nn.Module):
    """The image tower of an open_clip model with both outputs an SMP can read.

    Args:
        visual: the tower; its patch grid, normalisation and sizes are its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, visual: Any) -> None:
        """Take the tower as it is; see `load_open_clip`."""
        super().__init__()
        self.visual: Any = visual
        size = visual.image_size
        self.size: int = int(size[0] if isinstance(size, (tuple, list)) else size)
        self.register_buffer("mean", torch.tensor(OPENAI_DATASET_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_DATASET_STD), persistent=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, 3, size, size), square, resized, rounded to 8 bits, normalised."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be (batch, height, width, 3) in [0, 1]; got shape {tuple(images.shape)}.")
        square = square_crop(images).movedim(-1, 1).to(self.mean)
        if square.shape[-1] != self.size:
            square = F.interpolate(square, size=(self.size, self.size), mode="bicubic", antialias=True)
        levels = (square * 255).round().clamp(0, 255) / 255
        return (levels - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, images: Tensor) -> EncodedImages:
        """(B, H, W, 3) in [0, 1] -> embeddings and penultimate hidden states."""
        return self.encode_pixels(self.preprocess(images))

    def encode_pixels(self, pixels: Tensor) -> EncodedImages:
        """Normalised pixels (B, 3, size, size); all zeros are the unconditional rows' blank image."""
        output = self.visual.forward_intermediates(
            pixels,
            indices=[len(self.visual.transformer.resblocks) - 2],
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        prefix, patches = output["image_intermediates_prefix"][0], output["image_intermediates"][0]
        return EncodedImages(output["image_features"], torch.cat([prefix, patches], dim=1))


def load_open_clip(weights: Path, model: str = PAPER_MODEL) -> OpenCLIPEncoder:
    """An encoder from a local open_clip weights file; nothing is downloaded.

    Args:
        weights: `open_clip_model.safetensors`, or `open_clip_pytorch_model.bin` (read with weights_only).
        model: name of the architecture in open_clip.

    Raises:
        ValueError: no such file, or one that is not in open_clip's format or not of this architecture.
    """
    if not weights.is_file():
        raise ValueError(f"There is no open_clip weights file at {weights}.")
    state = load_state_dict(str(weights), weights_only=True)
    visual = {key.removeprefix("visual."): tensor for key, tensor in state.items() if key.startswith("visual.")}
    if not visual:
        raise ValueError(f"{weights.name} has no 'visual.' tensors, so it is not an open_clip weights file.")
    tower = open_clip.create_model(model, pretrained=None, load_weights=False).visual
    try:
        tower.load_state_dict(visual)
    except RuntimeError as error:
        raise ValueError(f"{weights.name} does not fit open_clip's {model}: {error}") from error
    return OpenCLIPEncoder(tower.eval())
