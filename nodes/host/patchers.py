"""Weights of our own as models that the host manages: device, dtype, offloading, copies for several GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def make_patcher(
    module: nn.Module, weights: Mapping[str, Tensor], source: tuple[Any, ...], *, disable_dynamic: bool
) -> ModelPatcher:
    """`module`, filled with `weights`, as a ModelPatcher.

    Args:
        module: built with the host's casting layers, on its offload device.
        weights: by the module's own parameter names.
        source: a function and its arguments (and, if it returns several patchers, which), with which the host loads the
            same again; it passes `disable_dynamic` besides. See `ModelPatcher.cached_patcher_init`.
        disable_dynamic: whether the host asks for a patcher without dynamic VRAM.

    Raises:
        ValueError: weights that are missing, unknown or of another shape; the message names them.
    """
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False, assign=patcher.is_dynamic())
    except RuntimeError as error:  # a weight of another shape
        raise ValueError(str(error)) from error
    if missing or unexpected:
        raise ValueError(f"missing weights: {_some(missing)}; unknown weights: {_some(unexpected)}")
    patcher.cached_patcher_init = source
    return patcher


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else "none"
