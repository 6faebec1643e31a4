"""One walk over the host's UNet: its blocks in the order in which it runs them, and what attends in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from torch import nn

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

BlockKey = tuple[str, int]
"""Name of a UNet block in the host's patches, ("input", 1)."""
Place = tuple[str, int, int]
"""Name of one attention in the host's patches: its block's, and its depth in the block."""


@dataclass(frozen=True)
class UNetBlock:
    """Layers that the UNet runs one after the other, between two of its skip connections."""

    key: BlockKey
    layers: Sequence[nn.Module]
    downsampling: int
    """Latent pixels along a side of what its first layer reads, by one of the latent's own."""

    @property
    def transformers(self) -> list[SpatialTransformer]:
        """Its spatial transformers: self-attention, cross-attention and feed-forward at every depth."""
        return [layer for layer in self.layers if isinstance(layer, SpatialTransformer)]

    @property
    def places(self) -> list[Place]:
        """Its self-attentions, and as many cross-attentions."""
        depth = sum(len(transformer.transformer_blocks) for transformer in self.transformers)
        return [(*self.key, index) for index in range(depth)]

    @property
    def resamples(self) -> bool:
        """Whether it ends a level of the UNet."""
        return any(isinstance(layer, Downsample | Upsample) for layer in self.layers)


def unet_of(model: ModelPatcher) -> nn.Module:
    """The diffusion model of this clone, whichever clone is at work in the loaded model; uncompiled, if it is compiled.

    It may be any: whoever needs a `UNetModel` checks.
    """
    found = model.get_model_object("diffusion_model")
    return getattr(found, "_orig_mod", found)  # torch.compile's wrapper has the module itself under this name


def unet_blocks(unet: UNetModel) -> Iterator[UNetBlock]:
    """All blocks of the host's `UNetModel`: input, middle, output."""
    downsampling = 1
    blocks = [
        *((("input", number), layers) for number, layers in enumerate(unet.input_blocks)),
        (("middle", 0), unet.middle_block),
        *((("output", number), layers) for number, layers in enumerate(unet.output_blocks)),
    ]
    for key, layers in blocks:
        block = UNetBlock(key, tuple(layers or ()), downsampling)  # some UNets have no middle block
        yield block
        for layer in block.layers:
            if isinstance(layer, Downsample):
                downsampling *= 2
            elif isinstance(layer, Upsample):
                downsampling //= 2


def blocks_with_attention(unet: UNetModel) -> list[UNetBlock]:
    """The blocks that hold a spatial transformer."""
    return [block for block in unet_blocks(unet) if block.transformers]
