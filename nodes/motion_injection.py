"""Motion modules in the host's UNet: where they go, and the patches that put them there.

Nothing is added to the UNet itself. The host lets a patch run a layer in its stead; ours runs the layer, then adds
the motion residual. The weights are an additional model of the patched model, loaded and moved by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import (
    Downsample,
    ResBlock,
    UNetModel,
    Upsample,
    VideoResBlock,
)
from comfy.model_sampling import ModelSamplingDiscrete
from comfy.supported_models import SD20

from .frame_indices import frame_indices, frames_per_call
from .motion_module import MotionModule, MotionModuleConfig
from .run_checks import FRAME, check_rows

MOTION_KEY = "storydiffusion_motion_module"
"""Key of our wrapper, of our additional model, and of the `RunningMotion` of a model call in transformer_options."""

Site = tuple[tuple[str, int], type]
"""A UNet block, and the class of the one layer in it whose output gets the motion residual."""


@dataclass(frozen=True)
class MotionSite:
    """One place for a temporal transformer."""

    site: Site
    path: str
    """The temporal transformer's name in the motion module, such as `down_blocks.0.motion_modules.1`."""
    channels: int


@dataclass(frozen=True)
class RunningMotion:
    """What the layers of one model call need."""

    transformers: Mapping[Site, torch.nn.Module]
    frames: int
    scale: float


def motion_sites(unet: Any) -> list[MotionSite]:
    """Return where AnimateDiff puts temporal transformers in `unet`, derived from its levels and residual blocks.

    One follows every residual block, after the block's spatial transformer if it has one, and before a
    downsampling or upsampling; in the middle one follows the spatial transformer. Levels without a residual block
    (SD1.5 has none) are not counted.
    """
    sites = [*_side_sites(unet.input_blocks, "input", "down_blocks", Downsample)]
    sites += _block_site(unet.middle_block or (), ("middle", 0), "mid_block.motion_modules.0")
    sites += _side_sites(unet.output_blocks, "output", "up_blocks", Upsample)
    return sites


def _side_sites(blocks: Any, side: str, level_name: str, resampling: type) -> Iterator[MotionSite]:
    level = index = 0
    for number, layers in enumerate(blocks):
        for site in _block_site(layers, (side, number), f"{level_name}.{level}.motion_modules.{index}"):
            yield site
            index += 1
        if index and any(isinstance(layer, resampling) for layer in layers):
            level, index = level + 1, 0


def _block_site(layers: Any, block: tuple[str, int], path: str) -> list[MotionSite]:
    residual_blocks = [layer for layer in layers if isinstance(layer, ResBlock)]
    if not residual_blocks:
        return []
    attends = any(isinstance(layer, SpatialTransformer) for layer in layers)
    return [MotionSite((block, SpatialTransformer if attends else ResBlock), path, residual_blocks[0].out_channels)]


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


def require_image_unet(model: Any) -> Any:
    """Return the UNet of `model`; ValueError if it has none, or one that moves already."""
    unet = model.get_model_object("diffusion_model")
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"Motion modules need an SD1.5 UNet, but this model is a {type(model.model).__name__} "
            f"({type(unet).__name__}). Load an SD1.5 checkpoint."
        )
    if isinstance(model.model.model_config, SD20):
        raise ValueError("Motion modules are for SD1.5, but this model is an SD2. Load an SD1.5 checkpoint.")
    if any(isinstance(layer, VideoResBlock | SpatialVideoTransformer) for layer in unet.modules()):
        raise ValueError("This model's UNet is a video model already. Load an SD1.5 checkpoint.")
    patches = model.model_options["transformer_options"].get("patches", {})
    for layer_class, _ in patches.get("forward_timestep_embed_patch", []):
        if issubclass(SpatialTransformer, layer_class) or issubclass(ResBlock, layer_class):
            raise ValueError(
                "This model has a motion module already, or another node took over the same UNet layers, and only "
                "one can run. Connect the model from before that node."
            )
    return unet


def attach_motion(model: Any, motion_module: Any, scale: float) -> None:
    """Put `motion_module`, a ModelPatcher of a `MotionModule`, into `model`, a clone; ValueError if it doesn't fit."""
    module: MotionModule = motion_module.model
    sites = require_fit(module.config, module.name, motion_sites(require_image_unet(model)))
    model.set_additional_models(MOTION_KEY, [motion_module])
    wrappers = comfy.patcher_extension.WrappersMP
    model.add_wrapper_with_key(wrappers.OUTER_SAMPLE, MOTION_KEY, check_rows(FRAME, "Apply Motion Module"))
    model.add_wrapper_with_key(wrappers.APPLY_MODEL, MOTION_KEY, _announce_motion(sites, scale))
    for patch in layer_patches():
        model.set_model_forward_timestep_embed_patch(patch)


def layer_patches() -> list[tuple[type, Callable[..., torch.Tensor]]]:
    """The host's `forward_timestep_embed_patch` entries that add the `RunningMotion` of a call to its layers."""
    return [(SpatialTransformer, _spatial_transformer), (ResBlock, _residual_block)]


def _announce_motion(sites: list[MotionSite], scale: float) -> Callable[..., torch.Tensor]:
    """APPLY_MODEL wrapper. The weights are looked up in each call: another GPU's clone has its own."""

    def announce(executor: Any, x: torch.Tensor, *call: Any, **kwargs: Any) -> torch.Tensor:
        *between, transformer_options = call
        patcher = executor.class_obj.current_patcher.get_additional_models_with_key(MOTION_KEY)[0]
        frames = frames_per_call(x.shape[0], transformer_options)
        require_few_frames(frame_indices(frames, transformer_options), patcher.model.config.max_frames)
        motion = RunningMotion({site.site: patcher.model.get_submodule(site.path) for site in sites}, frames, scale)
        return executor(x, *between, {**transformer_options, MOTION_KEY: motion}, **kwargs)

    return announce


def require_few_frames(indices: list[int], max_frames: int) -> None:
    """Raise ValueError if a call holds the frames `indices` of the video, and these are more than can attend."""
    if len(indices) > max_frames:
        raise ValueError(
            f"{len(indices)} frames are sampled at once, but the motion module was trained on at most {max_frames}. "
            f"For a longer video put Context Windows (Manual) behind Apply Motion Module, with dim 0, a "
            f"context_length of 16 and causal_window_fix off."
        )


def _spatial_transformer(
    layer: Any, x: torch.Tensor, _emb: Any, context: Any, transformer_options: dict[str, Any], *_: Any
) -> torch.Tensor:
    x = layer(x, context, transformer_options)
    if "transformer_index" in transformer_options:  # the host counts only the layers that it runs itself
        transformer_options["transformer_index"] += 1
    return _add_motion(x, SpatialTransformer, transformer_options)


def _residual_block(
    layer: Any, x: torch.Tensor, emb: Any, _context: Any, transformer_options: dict[str, Any], *_: Any
) -> torch.Tensor:
    return _add_motion(layer(x, emb), ResBlock, transformer_options)


def _add_motion(x: torch.Tensor, layer_class: type, transformer_options: dict[str, Any]) -> torch.Tensor:
    motion: RunningMotion = transformer_options[MOTION_KEY]
    transformer = motion.transformers.get((transformer_options["block"], layer_class))
    if transformer is None:
        return x
    return torch.add(x, transformer(x, motion.frames, transformer_options), alpha=motion.scale)


def linear_beta_sampling(model: Any) -> Any:
    """Return the model's noise schedule with AnimateDiff's betas: linear from 0.00085 to 0.012, sigma_max 25.1.

    The prediction type and a distilled schedule (LCM) stay what they are. The host calls these betas
    `sqrt_linear`; its `linear` is linear in their square root.
    """
    current = model.get_model_object("model_sampling")
    if not isinstance(current, ModelSamplingDiscrete):
        raise ValueError(
            f"This model samples with {type(current).__mro__[1].__name__}, which has no betas. Set beta_schedule to "
            f"'from the model'."
        )
    settings = {
        **model.model.model_config.sampling_settings,
        "beta_schedule": "sqrt_linear",
        "linear_start": 0.00085,
        "linear_end": 0.012,
    }
    # A schedule reads nothing else of a model config, and the host's can't be copied.
    return type(current)(SimpleNamespace(sampling_settings=settings), zsnr=current.zsnr)
