"""A loaded SMP, its weights managed by the host, and the motion it predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ..smp.config import SMPModelConfig, TokenSpace
from ..smp.model import SMPWeights


@dataclass(frozen=True)
class SMPEmbeds:
    """Predicted motion: what every frame of every transition puts into cross-attention.

    Attributes:
        tokens: (pairs, frames, N, C).
        uncond: (N, C), for the unconditional rows of every frame.
        token_space: the space the motion was predicted in.
    """

    tokens: Tensor
    uncond: Tensor
    token_space: TokenSpace


@dataclass(frozen=True)
class LoadedSMP:
    """An SMP in the host's hands: its config, a summary for users, a ModelPatcher for each module."""

    config: SMPModelConfig
    summary: str
    motion: Any
    added_kv: Any


def load_smp(read: Callable[[], SMPWeights], summary: str) -> LoadedSMP:
    """Give an SMP's weights to the host to manage (device, dtype, offloading, copies for several GPUs).

    Args:
        read: reads the file; called again when the host wants pristine weights.
        summary: one sentence for users.
    """
    motion, added_kv = load_patchers(read)
    return LoadedSMP(motion.model.config, summary, motion, added_kv)


def load_patchers(read: Callable[[], SMPWeights], disable_dynamic: bool = False) -> list[Any]:
    """ModelPatchers of the motion and the added-projection module."""
    weights = read()
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    offload_device = comfy.model_management.unet_offload_device()
    modules = weights.modules(operations=comfy.ops.manual_cast, device=offload_device)
    patchers = []
    for position, (module, state) in enumerate(zip(modules, (weights.motion, weights.added_kv), strict=True)):
        patcher = patcher_class(module, comfy.model_management.get_torch_device(), offload_device)
        module.load_state_dict(state, assign=patcher.is_dynamic())
        patcher.cached_patcher_init = (load_patchers, (read,), position)
        patchers.append(patcher)
    return patchers


def predict_motion(smp: LoadedSMP, features: Tensor, blank: Tensor | None, frames: int) -> SMPEmbeds:
    """Motion between each image and the next.

    Args:
        smp: the loaded SMP.
        features: encoder output of M images, (M, E) or (M, T, E) as `SemanticMotion.tokens` reads it.
        blank: encoder output of the blank image with M = 1, or None where unconditional rows see zero tokens.
        frames: F.

    Returns:
        M - 1 transitions of F frames.
    """
    comfy.model_management.load_model_gpu(smp.motion)
    module, device = smp.motion.model, smp.motion.load_device
    with torch.no_grad():
        tokens = module.tokens(features.to(device, torch.float32))
        blank_tokens = torch.zeros_like(tokens[:1]) if blank is None else module.tokens(blank.to(tokens))
        uncond = module.project(blank_tokens)
        motion = module.transition(tokens[:-1], tokens[1:], frames)
    output = comfy.model_management.intermediate_device()
    return SMPEmbeds(motion.to(output), uncond[0].to(output), smp.config.token_space)
