"""Panels through the host's CLIP vision model, to what an SMP reads (equation 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management
import torch

from ...smp.images import square_crop
from .loading import LoadedSMP

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel


def encode_panels(clip_vision: ClipVisionModel, smp: LoadedSMP, images: torch.Tensor) -> torch.Tensor:
    """What `smp` reads of each image, from a core CLIP_VISION: (M, H, W, 3) -> (M, E) or (M, T, E).

    Images are cropped to their centre square first: on a square, the host's encoder and open_clip's agree.

    Raises:
        ValueError: a CLIP vision model of another width than the SMP was made for.
    """
    output = clip_vision.encode_image(square_crop(images[..., :3]))
    resampled = smp.config.token_space == "resampled"
    features = output["penultimate_hidden_states"] if resampled else output["image_embeds"]
    what = "hidden states" if resampled else "image embeddings"
    if features.shape[-1] != smp.config.encoder_width:
        raise ValueError(
            f"The connected CLIP vision model gives {what} of width {features.shape[-1]}, but this SMP "
            f"reads width {smp.config.encoder_width}. {_encoder_advice(smp)}"
        )
    return features


def _encoder_advice(smp: LoadedSMP) -> str:
    width = (smp.config.token_space, smp.config.encoder_width)
    known = {
        ("image_embeds", 1024): "CLIP-ViT-H-14-laion2B-s32B-b79K",
        ("resampled", 1280): "CLIP-ViT-H-14-laion2B-s32B-b79K",
        ("image_embeds", 1280): "CLIP-ViT-bigG-14-laion2B-39B-b160k (IP-Adapter's vit-G files are made for it)",
    }
    return f"Load {known[width]}." if width in known else "Load the one that it was trained with."


def encode_blank(clip_vision: ClipVisionModel, smp: LoadedSMP) -> torch.Tensor:
    """What `smp` reads of the blank image, whose normalised pixels are exactly zero: (1, E) or (1, T, E).

    `encode_image` would round the blank image's grey to 8 bits, and away from zero.
    """
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    size = clip_vision.image_size
    pixels = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    output = clip_vision.model(pixel_values=pixels, intermediate_output=-2)
    return output[1] if smp.config.token_space == "resampled" else output[2]
