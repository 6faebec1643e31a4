"""Seeded stand-ins for video: an SD1.5 with SD1.5's own block layout, and motion modules that fit it.

Run as a module it writes checkpoint and motion modules below one models folder:
`storydiffusion.devtools.tiny.motion FOLDER`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch

from ...nodes.animatediff.module import MotionModule, MotionModuleConfig
from .checkpoints import TINY_SD15, TinyCheckpoint, ensure_checkpoint
from .seeded_weights import ensure_file, parameter_shapes, seeded_state_dict

SD15_LAYOUT: dict[str, Any] = {
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}

TINY_SD15_VIDEO = TinyCheckpoint(
    file_name="tiny_sd15_video.safetensors",
    family=comfy.supported_models.SD15,
    text_encoder=TINY_SD15.text_encoder,
    unet={**TINY_SD15.unet, **SD15_LAYOUT, "channel_mult": [1, 1, 1, 1]},
    text_encoder_layers=TINY_SD15.text_encoder_layers,
)

# The same layout at a tenth of the channels, for what needs no checkpoint file: a sampling step in a fraction of
# a second.
NARROW_WIDTHS = (32, 32, 64, 64)
NARROW_UNET: dict[str, Any] = {
    **SD15_LAYOUT,
    "model_channels": 32,
    "context_dim": 32,
    "channel_mult": [1, 1, 2, 2],
}


@dataclass(frozen=True)
class SeededMotionModule:
    """What one motion module file holds."""

    file_name: str
    config: MotionModuleConfig
    seed: int = 0


def motion_config(
    widths: tuple[int, ...], *, res_blocks: int = 2, middle: bool = True, max_frames: int = 32
) -> MotionModuleConfig:
    """Return the config of AnimateDiff v2 (v3: `middle` False) for a UNet with these channels per level."""
    return MotionModuleConfig(
        down=tuple((width,) * res_blocks for width in widths),
        middle=widths[-1] if middle else None,
        up=tuple((width,) * (res_blocks + 1) for width in reversed(widths)),
        max_frames=max_frames,
    )


SD15_WIDTHS = (320, 640, 1280, 1280)
FULL_V2 = SeededMotionModule("seeded_mm_sd15_v2.safetensors", motion_config(SD15_WIDTHS))
FULL_V3 = SeededMotionModule("seeded_mm_sd15_v3.safetensors", motion_config(SD15_WIDTHS, middle=False))
TINY_V2 = SeededMotionModule("tiny_mm_sd15_v2.safetensors", motion_config((320,) * 4))
TINY_V3 = SeededMotionModule("tiny_mm_sd15_v3.safetensors", motion_config((320,) * 4, middle=False), seed=1)


def positional_encoding(frames: int, channels: int) -> torch.Tensor:
    """Return the fixed sinusoids (1, frames, channels): sine on even channels, cosine on odd ones."""
    position = torch.arange(frames, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    encoding = torch.empty(1, frames, channels)
    encoding[0, :, 0::2] = torch.sin(position * frequency)
    encoding[0, :, 1::2] = torch.cos(position * frequency)
    return encoding


def motion_tensors(
    config: MotionModuleConfig, seed: int = 0, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Return seeded weights of a motion module under AnimateDiff's published names.

    The positional encoding stays float32: rounded to float16 it alone would move the output by 6e-5.
    """
    module = MotionModule(config, "", operations=comfy.ops.disable_weight_init, device="meta")
    tensors = seeded_state_dict(parameter_shapes(module), seed, dtype)
    encodings = {
        key: positional_encoding(*tensor.shape)[0]
        for key, tensor in tensors.items()
        if key.endswith("pos_encoder.weight")
    }
    return published(tensors | encodings)


def published(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a `MotionModule`'s weights under AnimateDiff's published names and shapes."""
    return {
        _published_name(key): tensor[None] if key.endswith("pos_encoder.weight") else tensor
        for key, tensor in weights.items()
    }


def _published_name(key: str) -> str:
    place, rest = re.match(r"(.*\.motion_modules\.\d+)\.(.*)", key).groups()  # type: ignore[union-attr]
    return f"{place}.temporal_transformer.{rest.replace('pos_encoder.weight', 'pos_encoder.pe')}"


def ensure_motion_module(spec: SeededMotionModule, folder: Path) -> Path:
    """Write the motion module into `folder` unless it is there already, made by this very recipe."""
    path = folder / spec.file_name
    recipe = repr(spec) + Path(__file__).read_text(encoding="utf-8")
    if ensure_file(path, recipe, lambda: motion_tensors(spec.config, spec.seed)):
        print(f"wrote {path}")
    return path


def seeded_sd15(unet: Mapping[str, Any], seed: int = 0) -> Any:
    """Return a float32 SD1.5 ModelPatcher with seeded weights, its UNet overridden by `unet`; no file, no encoder."""
    config = comfy.supported_models.SD15({**TINY_SD15.unet, **unet})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    shapes = parameter_shapes(model.diffusion_model)
    model.diffusion_model.load_state_dict(seeded_state_dict(shapes, seed, torch.float32), assign=True)
    patcher = comfy.model_patcher.CoreModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = (seeded_sd15, (dict(unet), seed))  # what a deep clone for another GPU calls
    return patcher


def main() -> None:
    folder = Path(sys.argv[1])
    ensure_checkpoint(TINY_SD15_VIDEO, folder / "checkpoints")
    for spec in (TINY_V2, TINY_V3):
        ensure_motion_module(spec, folder / "animatediff_models")


if __name__ == "__main__":
    main()
