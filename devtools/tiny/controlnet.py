"""Seeded ControlNet that fits a tiny checkpoint, for the stock loader; unlike an untrained one it acts: no convolution
is zero.

Run as a module it writes those for the tiny SD1.5 and SDXL below one models folder:
`storydiffusion.devtools.tiny.controlnet FOLDER`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import comfy.cldm.cldm
import comfy.ops
import torch

from .checkpoints import TINY_SD15, TINY_SDXL, TinyCheckpoint
from .seeded_weights import ensure_file, parameter_shapes, seeded_state_dict


@dataclass(frozen=True)
class SeededControlNet:
    """What one ControlNet file holds; `base` is the checkpoint that it steers."""

    file_name: str
    base: TinyCheckpoint
    seed: int = 0


TINY_SD15_CONTROL = SeededControlNet("tiny_control_sd15.safetensors", TINY_SD15)
TINY_SDXL_CONTROL = SeededControlNet("tiny_control_sdxl.safetensors", TINY_SDXL)


def controlnet_tensors(spec: SeededControlNet, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Return seeded weights under the names of the ControlNet paper's files."""
    config = {name: value for name, value in spec.base.unet.items() if name != "out_channels"}
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, device="meta", operations=comfy.ops.disable_weight_init
    )
    return seeded_state_dict(parameter_shapes(network, "control_model."), spec.seed, dtype)


def ensure_controlnet(spec: SeededControlNet, folder: Path) -> Path:
    """Write the ControlNet into `folder` unless it is there already, made by this very recipe."""
    path = folder / spec.file_name
    recipe = repr(spec) + Path(__file__).read_text(encoding="utf-8")
    if ensure_file(path, recipe, lambda: controlnet_tensors(spec)):
        print(f"wrote {path}")
    return path


def main() -> None:
    for spec in (TINY_SD15_CONTROL, TINY_SDXL_CONTROL):
        ensure_controlnet(spec, Path(sys.argv[1]) / "controlnet")


if __name__ == "__main__":
    main()
