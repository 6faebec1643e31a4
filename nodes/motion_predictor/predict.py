"""The motion that an SMP predicts between panels (equation 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_management
import torch
from torch import Tensor

from ...smp.config import TokenSpace
from .encode import encode_blank, encode_panels
from .loading import LoadedSMP

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel


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


def predict_transitions(clip_vision: ClipVisionModel, smp: LoadedSMP, images: Tensor, frames: int) -> SMPEmbeds:
    """Motion between each panel and the next.

    Args:
        clip_vision: the encoder that the SMP was made for.
        smp: the loaded SMP.
        images: (N, H, W, C) panels, at least two.
        frames: F.

    Returns:
        N - 1 transitions of F frames.

    Raises:
        ValueError: a single panel, another encoder.
    """
    if images.shape[0] < 2:
        raise ValueError(
            f"images holds {images.shape[0]} panel; a transition needs two. Connect a batch of at least two panels."
        )
    features = encode_panels(clip_vision, smp, images)
    blank = encode_blank(clip_vision, smp) if smp.config.uncond == "blank_image" else None
    return predict_motion(smp, features, blank, frames)


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


def describe(smp: LoadedSMP, embeds: SMPEmbeds) -> str:
    """What was predicted, for users."""
    pairs, frames, tokens, width = embeds.tokens.shape
    lines = [
        smp.summary,
        f"Transitions: {pairs}, of {frames} frames; {tokens} tokens of width {width} a frame.",
    ]
    predictor = smp.config.predictor
    if predictor is not None and frames > predictor.max_frames:
        lines.append(
            f"The predictor was trained on up to {predictor.max_frames} frames: {frames} sample the same "
            "motion more finely, which it was not trained for."
        )
    return "\n".join(lines)
