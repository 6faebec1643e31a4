"""Seeded stand-ins for SMP transitions: IP-Adapter weight files that fit a UNet, and a small CLIP vision
model.

Run as a module it writes IP-Adapter files that fit `motion`'s SD1.5 below one models folder:
`storydiffusion.devtools.tiny.smp FOLDER`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.clip_vision
import torch

from ...smp.config import SD15_SITES, ProjectionConfig, ResamplerConfig
from ...smp.image_tokens import ImageProjection, Resampler
from .seeded_weights import ensure_file, parameter_shapes, seeded_state_dict, seeded_tensor

VISION_WIDTH = 1280
EMBED_WIDTH = 1024


@dataclass(frozen=True)
class SeededIPAdapter:
    """What one IP-Adapter file holds; `channels` are those of the UNet's 16 cross-attentions, as numbered."""

    file_name: str
    plus: bool
    channels: tuple[int, ...]
    seed: int = 0


TINY_BASE = SeededIPAdapter("tiny_ip-adapter_sd15.safetensors", False, (320,) * len(SD15_SITES))
TINY_PLUS = SeededIPAdapter("tiny_ip-adapter-plus_sd15.safetensors", True, (320,) * len(SD15_SITES), seed=1)


def ip_adapter_tensors(spec: SeededIPAdapter, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Return seeded weights of an IP-Adapter for SD1.5 under its published names."""
    with torch.device("meta"):
        image_proj = Resampler(ResamplerConfig()) if spec.plus else ImageProjection(ProjectionConfig())
    tensors = {
        f"image_proj.{name}": tensor
        for name, tensor in seeded_state_dict(parameter_shapes(image_proj), spec.seed, dtype).items()
    }
    if spec.plus:
        tensors["image_proj.latents"] = tensors.pop("image_proj.latents.weight")[None]
    for position, channels in enumerate(spec.channels):
        for part in ("to_k_ip", "to_v_ip"):
            key = f"ip_adapter.{2 * position + 1}.{part}.weight"
            tensors[key] = seeded_tensor(key, (channels, 768), spec.seed).to(dtype)
    return tensors


def ensure_ip_adapter(spec: SeededIPAdapter, folder: Path) -> Path:
    """Write the file into `folder` unless it is there already, made by this very recipe."""
    path = folder / spec.file_name
    recipe = repr(spec) + Path(__file__).read_text(encoding="utf-8")
    if ensure_file(path, recipe, lambda: ip_adapter_tensors(spec)):
        print(f"wrote {path}")
    return path


def tiny_clip_vision(
    *, embed_width: int = EMBED_WIDTH, width: int = VISION_WIDTH, image_size: int = 28, seed: int = 0
) -> Any:
    """Return a genuine CLIP_VISION with ViT-H's output widths, three layers and few patches; no file."""
    config = {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 3,
        "hidden_size": width,
        "num_attention_heads": 16,
        "intermediate_size": 64,
        "hidden_act": "gelu",
        "projection_dim": embed_width,
        "image_size": image_size,
        "patch_size": 14,
        "num_channels": 3,
    }
    model = comfy.clip_vision.ClipVisionModel(config)
    model.load_sd(seeded_state_dict(parameter_shapes(model.model), seed, model.dtype))
    return model


def main() -> None:
    for spec in (TINY_BASE, TINY_PLUS):
        ensure_ip_adapter(spec, Path(sys.argv[1]) / "ipadapter")


if __name__ == "__main__":
    main()
