"""Motion modules in the host's UNet: the patches that put them there.

Nothing is added to the UNet itself. The host lets a patch run a layer in its stead; ours runs the layer, then adds
the motion residual. The weights are an additional model of the patched model, loaded and moved by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel, VideoResBlock
from comfy.supported_models import SD20, SDXL, SDXLRefiner

from ..host.rows import FRAME, row_indices, rows_per_chunk
from ..host.run_checks import prepare_rows
from ..host.unet import unet_of
from .module import MotionModule
from .schedule import LINEAR_BETAS, linear_beta_sampling
from .sites import MotionSite, Site, motion_sites, require_fit

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

OTHER_FAMILIES = ((SD20, "SD2"), (SDXL, "SDXL"), (SDXLRefiner, "SDXL refiner"))
"""UNets that AnimateDiff's modules for SD1.5 aren't for, most of them of other sizes."""
MOTION_KEY = "storydiffusion_motion_module"
"""Key of our wrapper, of our additional model, and of the `RunningMotion` of a model call in transformer_options."""


@dataclass(frozen=True)
class RunningMotion:
    """What the layers of one model call need."""

    transformers: Mapping[Site, torch.nn.Module]
    frames: int
    scale: float


def apply_motion_module(
    model: ModelPatcher, motion_module: ModelPatcher, scale: float = 1.0, beta_schedule: str = LINEAR_BETAS
) -> ModelPatcher:
    """`model` with a motion module, for batches whose rows are the frames of a video.

    Args:
        model: SD1.5.
        motion_module: a ModelPatcher of a `MotionModule`.
        scale: of the motion residual; at 0 the model is given back as it is.
        beta_schedule: LINEAR_BETAS or MODEL_BETAS.

    Raises:
        ValueError: a model and a motion module that don't fit each other.
    """
    if scale == 0:
        return model
    model = model.clone()
    attach_motion(model, motion_module, scale)
    if beta_schedule == LINEAR_BETAS:
        model.add_object_patch("model_sampling", linear_beta_sampling(model))
    return model


def require_image_unet(model: ModelPatcher) -> UNetModel:
    """The UNet of `model`; ValueError if it has none, or one that moves already."""
    unet = unet_of(model)
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"Motion modules need an SD1.5 UNet, but this model is a {type(model.model).__name__} "
            f"({type(unet).__name__}). Load an SD1.5 checkpoint."
        )
    kind = next((name for family, name in OTHER_FAMILIES if isinstance(model.model.model_config, family)), None)
    if kind:
        raise ValueError(f"Motion modules are for SD1.5, but this model is an {kind}. Load an SD1.5 checkpoint.")
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


def attach_motion(model: ModelPatcher, motion_module: ModelPatcher, scale: float) -> None:
    """Put `motion_module`, a ModelPatcher of a `MotionModule`, into `model`, a clone; ValueError if it doesn't fit."""
    module: MotionModule = motion_module.model
    sites = require_fit(module.config, module.name, motion_sites(require_image_unet(model)))
    model.set_additional_models(MOTION_KEY, [motion_module])
    wrappers = comfy.patcher_extension.WrappersMP
    model.add_wrapper_with_key(wrappers.OUTER_SAMPLE, MOTION_KEY, prepare_rows(FRAME, "Apply Motion Module"))
    model.add_wrapper_with_key(wrappers.APPLY_MODEL, MOTION_KEY, _announce_motion(sites, scale, motion_module))
    for patch in layer_patches():
        model.set_model_forward_timestep_embed_patch(patch)


def layer_patches() -> list[tuple[type, Callable[..., torch.Tensor]]]:
    """The host's `forward_timestep_embed_patch` entries that add the `RunningMotion` of a call to its layers."""
    return [(SpatialTransformer, _spatial_transformer), (ResBlock, _residual_block)]


def _announce_motion(sites: list[MotionSite], scale: float, motion_module: ModelPatcher) -> Callable[..., torch.Tensor]:
    """APPLY_MODEL wrapper. The weights are looked up in each call: another GPU's clone has its own.

    A guider of two models runs the second with the patches of the first, but without its additional models: then the
    first one's `motion_module` runs.
    """

    def announce(executor: Any, x: torch.Tensor, *call: Any, **kwargs: Any) -> torch.Tensor:
        *between, transformer_options = call
        added = executor.class_obj.current_patcher.get_additional_models_with_key(MOTION_KEY)
        patcher = added[0] if added else motion_module
        frames = rows_per_chunk(x.shape[0], transformer_options)
        require_few_frames(row_indices(frames, transformer_options), patcher.model.config.max_frames)
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
