"""The toy world's image encoder: the host's CLIP vision class in a small config, as a genuine CLIP_VISION."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.utils
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .pixel_vae import ENLARGED

WEIGHTS = Path(__file__).parent / "toy_vision.safetensors"
EMBED_WIDTH = 256
# One patch is 4 x 4 of the world's pixels.
CONFIG: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_act": "quick_gelu",
    "projection_dim": EMBED_WIDTH,
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 3,
}


def new_tower(seed: int) -> CLIPVisionModelWithProjection:
    """An untrained encoder. transformers' class has the host's weight names and can be trained; the host's can't."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**CONFIG)).train()


def load_vision(path: Path = WEIGHTS) -> Any:
    """A CLIP_VISION as the stock loader makes them, weights from the safetensors file at `path`."""
    model = comfy.clip_vision.ClipVisionModel(CONFIG)
    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    missing, unexpected = model.load_sd({key: value.to(model.dtype) for key, value in state.items()})
    if missing or unexpected:
        raise ValueError(f"The weights don't fit the toy encoder: missing {missing}, unexpected {unexpected}.")
    return model


@torch.no_grad()
def encode_pictures(clip_vision: Any, pictures: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """What `encode_image` gives for enlarged pictures (B, 32, 32, 3), a good deal quicker.

    Returns:
        penultimate hidden states (B, 65, C) and image embeddings (B, E), float32.
    """
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    pixels = pixel_values(pictures).to(clip_vision.load_device)
    _, hidden, embeds, _ = clip_vision.model(pixel_values=pixels, intermediate_output=-2)
    return hidden.float(), embeds.float()


def enlarge(pictures: np.ndarray | Tensor) -> Tensor:
    """Pictures (B, 32, 32, 3), 0 to 1, as IMAGE of the toy VAE's size, (B, 256, 256, 3)."""
    images = torch.as_tensor(pictures).movedim(-1, 1).float()
    return F.interpolate(images, scale_factor=ENLARGED, mode="nearest").movedim(1, -1)


def pixel_values(pictures: np.ndarray | Tensor) -> Tensor:
    """What the host makes of enlarged pictures before its encoder sees them, (B, 32, 32, 3) to (B, 3, 32, 32).

    The same as `clip_preprocess(enlarge(pictures))`, without going through 256 x 256 pixels.
    """
    images = torch.as_tensor(pictures).movedim(-1, 1).float()
    levels = (255 * (_resized() @ images @ _resized().T)).clamp(0, 255).round() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (levels - mean) / std


@cache
def _resized() -> Tensor:
    """Enlarging and resizing back as one matrix: each of the two is linear, and the same along both axes."""
    size = CONFIG["image_size"]
    wide = torch.eye(size).repeat_interleave(ENLARGED, dim=0)[None, None]  # (1, 1, 8 * 32, 32)
    return F.interpolate(wide, size=(size, size), mode="bicubic", antialias=True)[0, 0]
