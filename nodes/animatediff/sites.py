"""Where AnimateDiff's temporal transformers go in a UNet, and whether a motion module fits there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

from ..host.unet import BlockKey, UNetBlock, unet_blocks
from .module import MotionModuleConfig

Site = tuple[BlockKey, type]
"""A UNet block, and the class of the one layer in it whose output gets the motion residual."""

LEVELS = {"input": "down_blocks", "middle": "mid_block", "output": "up_blocks"}
"""What a motion module calls the UNet's three parts."""


@dataclass(frozen=True)
class MotionSite:
    """One place for a temporal transformer."""

    site: Site
    path: str
    """The temporal transformer's name in the motion module, such as `down_blocks.0.motion_modules.1`."""
    channels: int


def motion_sites(unet: UNetModel) -> list[MotionSite]:
    """Where AnimateDiff puts temporal transformers in `unet`, derived from its levels and residual blocks.

    One follows every residual block, after the block's spatial transformer if it has one, and before a
    downsampling or upsampling; in the middle one follows the spatial transformer. Levels without a residual block
    (SD1.5 has none) are not counted.
    """
    parts = groupby(unet_blocks(unet), key=lambda block: block.key[0])
    return [site for part, blocks in parts for site in _sites_of_part(LEVELS[part], list(blocks))]


def _sites_of_part(name: str, blocks: Sequence[UNetBlock]) -> Iterator[MotionSite]:
    level = index = 0
    for block in blocks:
        residual = [layer for layer in block.layers if isinstance(layer, ResBlock)]
        if residual:
            path = name if name == "mid_block" else f"{name}.{level}"
            layer_class = SpatialTransformer if block.transformers else ResBlock
            yield MotionSite((block.key, layer_class), f"{path}.motion_modules.{index}", residual[0].out_channels)
            index += 1
        if index and block.resamples:
            level, index = level + 1, 0


def require_fit(config: MotionModuleConfig, name: str, sites: list[MotionSite]) -> list[MotionSite]:
    """Return the sites that the motion module fills; ValueError unless its sizes are those of the UNet."""
    offered = {site.path: site.channels for site in sites}
    wanted = {
        f"{side}.{level}.motion_modules.{index}": width
        for side, levels in (("down_blocks", config.down), ("up_blocks", config.up))
        for level, channels in enumerate(levels)
        for index, width in enumerate(channels)
    }
    if config.middle is None:  # v3 leaves the middle without motion
        offered = {path: width for path, width in offered.items() if not path.startswith("mid_block")}
    else:
        wanted["mid_block.motion_modules.0"] = config.middle
    if wanted != offered:
        raise ValueError(
            f"The motion module {name} doesn't fit this model. Channels it was made for, level by level: "
            f"{_layout(wanted)}. The model's UNet: {_layout(offered)}. Load a checkpoint and a motion module of one "
            f"family (AnimateDiff v2 and v3 go with SD1.5)."
        )
    return [site for site in sites if site.path in wanted]


def _layout(widths: Mapping[str, int]) -> str:
    levels: dict[str, list[str]] = {}
    for path, width in widths.items():
        levels.setdefault(path.split(".motion_modules")[0], []).append(str(width))
    return ", ".join(f"{level} {'+'.join(channels)}" for level, channels in levels.items())
