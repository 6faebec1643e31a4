"""Where in the UNet panels share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..host.unet import UNetBlock, unet_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

BLOCK_CHOICES = ["decoder", "decoder_upper_levels", "all"]


def require_unet(model: ModelPatcher) -> UNetModel:
    """The model's UNet, or an error that says what the model is instead."""
    unet = unet_of(model)
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"Consistent Self-Attention works on UNet models (SD1.5, SDXL), but this model is a "
            f"{type(model.model).__name__} ({type(unet).__name__}). Load an SD1.5 or SDXL checkpoint."
        )
    return unet


def decoder_blocks(blocks: Sequence[UNetBlock]) -> list[UNetBlock]:
    """The blocks after the middle one."""
    return [block for block in blocks if block.key[0] == "output"]


def choose_blocks(blocks: Sequence[UNetBlock], choice: str) -> list[UNetBlock]:
    """Those of a UNet's blocks with attention that `choice`, one of BLOCK_CHOICES, stands for."""
    if choice == "all":
        return list(blocks)
    decoder = decoder_blocks(blocks)
    if choice == "decoder":
        return decoder
    if choice == "decoder_upper_levels":
        lowest = max(block.downsampling for block in decoder)
        return [block for block in decoder if block.downsampling < lowest]
    raise ValueError(f"blocks is {choice!r}; it must be one of {', '.join(BLOCK_CHOICES)}.")
