"""The Semantic Motion Predictor (StoryDiffusion, arXiv 2405.01434, equation 5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import attend
from .config import SMPConfig
from .interpolation import frame_times, interpolate_linear

TIME_FREQUENCIES = 32


def time_features(times: Tensor, max_frames: int) -> Tensor:
    """Sinusoids of continuous time: (F,) in [0, 1] -> (F, 2 * TIME_FREQUENCIES).

    Frequencies run from half a period over the whole transition to the finest motion that `max_frames` frames
    can show (half a period per frame), so that position is a time and not an index: any number of frames has
    one.
    """
    octaves = torch.linspace(0, 1, TIME_FREQUENCIES, device=times.device, dtype=torch.float32)
    angles = times.float()[:, None] * (math.pi * (max_frames - 1) ** octaves)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SelfAttention(nn.Module):
    """Self-attention of `heads` heads of `head_dim`, projected from and to `hidden` channels."""

    def __init__(self, config: SMPConfig, operations: Any, **factory: Any) -> None:
        """Args: see `SemanticMotionPredictor`."""
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.to_q = operations.Linear(config.hidden, inner, bias=False, **factory)
        self.to_k = operations.Linear(config.hidden, inner, bias=False, **factory)
        self.to_v = operations.Linear(config.hidden, inner, bias=False, **factory)
        self.to_out = operations.Linear(inner, config.hidden, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        return self.to_out(attend(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class TransformerLayer(nn.Module):
    """Pre-norm layer: attention over every token of every frame, then an MLP of four times the width."""

    def __init__(self, config: SMPConfig, operations: Any, **factory: Any) -> None:
        """Args: see `SemanticMotionPredictor`."""
        super().__init__()
        self.norm1 = operations.LayerNorm(config.hidden, **factory)
        self.attn = SelfAttention(config, operations, **factory)
        self.norm2 = operations.LayerNorm(config.hidden, **factory)
        self.mlp = nn.Sequential(
            operations.Linear(config.hidden, 4 * config.hidden, **factory),
            nn.GELU(),
            operations.Linear(4 * config.hidden, config.hidden, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SemanticMotionPredictor(nn.Module):
    """Tokens of a start and an end frame -> tokens of every frame of the transition (equation 5).

    The linear interpolation K_1..K_F goes through a transformer over all F * N tokens. With `residual` the
    result is added to the interpolation, and the output layer starts at zero: an untrained predictor *is* the
    linear interpolation, exactly.

    Any number of frames runs: a frame's position is its time in [0, 1]. Beyond `max_frames` the same motion
    is sampled at times between the trained ones; nothing is extrapolated, but attention then covers more
    tokens than in training, so quality there is untested until somebody trains for it.

    Args:
        config: the shape.
        operations: where Linear, LayerNorm and Embedding come from: `torch.nn`, or the host's casting layers,
            whose weights are loaded after construction and are never touched here.
        factory: device and dtype of the weights.
    """

    def __init__(self, config: SMPConfig, *, operations: Any = nn, **factory: Any) -> None:
        """Random weights with a zero output layer under `torch.nn`; uninitialised ones otherwise."""
        super().__init__()
        self.config = config
        self.proj_in = operations.Linear(config.width, config.hidden, **factory)
        self.token_embedding = operations.Embedding(config.tokens, config.hidden, **factory)
        self.time_embedding = operations.Linear(2 * TIME_FREQUENCIES, config.hidden, **factory)
        self.layers = nn.ModuleList(TransformerLayer(config, operations, **factory) for _ in range(config.layers))
        self.norm_out = operations.LayerNorm(config.hidden, **factory)
        self.proj_out = operations.Linear(config.hidden, config.width, **factory)
        if operations is nn:
            self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if self.config.residual:
            nn.init.zeros_(self.proj_out.weight)
            nn.init.zeros_(self.proj_out.bias)

    def forward(self, start: Tensor, end: Tensor, frames: int) -> Tensor:
        """Predict P_1..P_F.

        Args:
            start: (B, N, C), tokens of the first frame of each pair.
            end: (B, N, C), tokens of the last frame.
            frames: F, at least 2.

        Returns:
            (B, F, N, C).

        Raises:
            ValueError: shapes that differ or do not fit the config, or fewer than 2 frames.
        """
        if tuple(start.shape[1:]) != (self.config.tokens, self.config.width):
            expected = (self.config.tokens, self.config.width)
            raise ValueError(f"This predictor reads tokens of shape {expected}, not {tuple(start.shape[1:])}.")
        line = interpolate_linear(start, end, frames)  # (B, F, N, C)
        motion = self._motion(line)
        tokens = line + motion if self.config.residual else motion
        if self.config.pin_ends:
            tokens = torch.cat([start[:, None], tokens[:, 1:-1], end[:, None]], dim=1)
        return tokens

    def _motion(self, line: Tensor) -> Tensor:
        """The transformer alone: (B, F, N, C) -> (B, F, N, C)."""
        frames, tokens = line.shape[1:3]
        slots = self.token_embedding(torch.arange(tokens, device=line.device)).to(line.dtype)  # (N, hidden)
        features = time_features(frame_times(frames, device=line.device), self.config.max_frames)
        times = self.time_embedding(features.to(line.dtype))  # (F, hidden)
        x = self.proj_in(line) + times[:, None] + slots  # (B, F, N, hidden)
        x = rearrange(x, "b f n c -> b (f n) c")
        for layer in self.layers:
            x = layer(x)
        x = self.proj_out(self.norm_out(x))
        return rearrange(x, "b (f n) c -> b f n c", f=frames)
