"""The part of an SMP before the UNet: encoder output -> tokens -> motion -> the tokens P_1..P_F."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import SMPModelConfig
from .image_tokens import ImageProjection, Resampler
from .injection import AddedKV
from .interpolation import interpolate_linear, interpolate_spherical
from .predictor import SemanticMotionPredictor


class SemanticMotion(nn.Module):
    """Resampler, predictor and image projection of an SMP, those of them that its config has.

    Args:
        config: the whole SMP.
        operations: where the layers come from: `torch.nn`, or the host's casting layers (uninitialised).
        factory: device and dtype of the weights.
    """

    def __init__(self, config: SMPModelConfig, *, operations: Any = nn, **factory: Any) -> None:
        """Random weights under `torch.nn`; the predictor then starts as the linear interpolation."""
        super().__init__()
        self.config = config
        factory = {"operations": operations, **factory}
        self.resampler = Resampler(config.resampler, **factory) if config.resampler else None
        self.predictor = SemanticMotionPredictor(config.predictor, **factory) if config.predictor else None
        self.projection = ImageProjection(config.projection, **factory) if config.projection else None

    def tokens(self, features: Tensor) -> Tensor:
        """Encoder output to token space; never normalised, since IP-Adapter's weights expect raw embeddings.

        Args:
            features: (B, encoder_width) image embeddings, or (B, T, encoder_width) penultimate hidden states
                when the token space is `resampled`.

        Returns:
            (B, N, C).

        Raises:
            ValueError: features of another rank or width.
        """
        rank = 3 if self.resampler is not None else 2
        if features.ndim != rank or features.shape[-1] != self.config.encoder_width:
            raise ValueError(
                f"This SMP reads {self.config.token_space} from {rank}-dimensional encoder output of width "
                f"{self.config.encoder_width}; got shape {tuple(features.shape)}."
            )
        return features[:, None] if self.resampler is None else self.resampler(features)

    def path(self, start: Tensor, end: Tensor, frames: int) -> Tensor:
        """From frame to frame in token space: (B, N, C) twice -> (B, frames, N, C)."""
        if self.predictor is not None:
            return self.predictor(start, end, frames)
        if self.config.interpolation == "spherical":
            return interpolate_spherical(start, end, frames)
        return interpolate_linear(start, end, frames)

    def transition(self, start: Tensor, end: Tensor, frames: int) -> Tensor:
        """Token space (B, N, C) twice -> cross-attention tokens (B, frames, N', C')."""
        return self.project(self.path(start, end, frames))

    def project(self, tokens: Tensor) -> Tensor:
        """Token space (..., N, C) -> cross-attention tokens (..., N', C')."""
        return tokens if self.projection is None else self.projection(tokens)


@dataclass(frozen=True)
class SMPWeights:
    """An SMP as read from a file: its config, and the tensors of its two modules by parameter name."""

    config: SMPModelConfig
    motion: dict[str, Tensor]
    added_kv: dict[str, Tensor]

    def __post_init__(self) -> None:
        """ValueError, naming the tensors, when they are not the ones that the config calls for."""
        with torch.device("meta"):
            motion, added_kv = self.modules()
        _require_tensors("motion", motion, self.motion)
        _require_tensors("added_kv", added_kv, self.added_kv)

    def modules(self, *, operations: Any = nn, **factory: Any) -> tuple[SemanticMotion, AddedKV]:
        """Both modules without these weights; load `motion` and `added_kv` into them."""
        factory = {"operations": operations, **factory}
        width = self.config.output_shape[1]
        return SemanticMotion(self.config, **factory), AddedKV(self.config.sites, width, **factory)

    def load(self) -> tuple[SemanticMotion, AddedKV]:
        """Both modules as plain torch modules with these weights, for training and measuring."""
        motion, added_kv = self.modules()
        motion.load_state_dict(self.motion)
        added_kv.load_state_dict(self.added_kv)
        return motion, added_kv


def _require_tensors(part: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"{part}.{name} {shape} is missing" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name not in expected:
            problems.append(f"{part}.{name} {shape} does not belong here")
        elif shape != expected[name]:
            problems.append(f"{part}.{name} is {shape}, its config says {expected[name]}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError("The weights do not fit their config: " + "; ".join(problems[:5]) + more + ".")
