"""AnimateDiff's motion module (arXiv 2307.04725): transformers over time between the layers of an image UNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import CrossAttention, FeedForward
from einops import rearrange
from torch import nn

NUM_HEADS = 8
NORM_GROUPS = 32
# Every pixel is a sequence of its own, and attention kernels end at 2**16 of them. A quarter of the host's own limit
# of 2**15 also holds the feed-forward's peak, at any size, to what the UNet's own takes at 512 x 512.
MAX_SEQUENCES = 2**13


@dataclass(frozen=True)
class MotionModuleConfig:
    """Channels of every temporal transformer, by UNet level (down: finest first, up: coarsest first)."""

    down: tuple[tuple[int, ...], ...]
    middle: int | None
    up: tuple[tuple[int, ...], ...]
    max_frames: int
    """Length of the positional encoding: the most frames that attend to one another."""


class TemporalAttention(CrossAttention):
    """Self-attention along time. The encoding counts from the first frame of the call, as in training."""

    def __init__(self, channels: int, max_frames: int, operations: Any, **factory: Any) -> None:
        super().__init__(channels, heads=NUM_HEADS, dim_head=channels // NUM_HEADS, operations=operations, **factory)
        # A module, although it never learns: the host then moves and casts it like any other weight.
        self.pos_encoder = operations.Embedding(max_frames, channels, **factory)

    def forward(self, x: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:  # type: ignore[override, unused-ignore]
        """x: (sequences, frames, channels); returns the same shape."""
        positions = torch.arange(x.shape[1], device=x.device)
        x = x + self.pos_encoder(positions, out_dtype=x.dtype)
        return super().forward(x, transformer_options=transformer_options)


class TemporalTransformerBlock(nn.Module):
    """Two self-attentions along time and a gated feed-forward, each behind a norm and with a residual."""

    def __init__(self, channels: int, max_frames: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList(
            TemporalAttention(channels, max_frames, operations, **factory) for _ in range(2)
        )
        self.norms = nn.ModuleList(operations.LayerNorm(channels, **factory) for _ in range(2))
        self.ff = FeedForward(channels, glu=True, operations=operations, **factory)
        self.ff_norm = operations.LayerNorm(channels, **factory)

    def forward(self, x: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
        """x: (sequences, frames, channels); returns the same shape."""
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x = x + attention(norm(x), transformer_options)
        return x + self.ff(self.ff_norm(x))


class TemporalTransformer(nn.Module):
    """What one motion module adds to the output of one UNet layer."""

    def __init__(self, channels: int, max_frames: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = operations.GroupNorm(NORM_GROUPS, channels, eps=1e-6, **factory)
        self.proj_in = operations.Linear(channels, channels, **factory)
        self.transformer_blocks = nn.ModuleList([TemporalTransformerBlock(channels, max_frames, operations, **factory)])
        self.proj_out = operations.Linear(channels, channels, **factory)

    def forward(self, x: torch.Tensor, frames: int, transformer_options: dict[str, Any]) -> torch.Tensor:
        """Return the motion residual of x.

        x: (videos * frames, channels, height, width), the frames of a video next to one another; the result has
        the same shape. Each group norm sees one frame (AnimateDiff's own code; diffusers pools all frames).
        """
        height, width = x.shape[-2:]
        tokens = rearrange(self.norm(x), "(b f) c h w -> (b h w) f c", f=frames)
        tokens = torch.cat([self._transform(part, transformer_options) for part in tokens.split(MAX_SEQUENCES)])
        return rearrange(tokens, "(b h w) f c -> (b f) c h w", h=height, w=width)

    def _transform(self, tokens: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, transformer_options)
        return self.proj_out(tokens)


class MotionLevel(nn.Module):
    """The temporal transformers of one UNet level."""

    def __init__(self, channels: tuple[int, ...], max_frames: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.motion_modules = nn.ModuleList(
            TemporalTransformer(width, max_frames, operations, **factory) for width in channels
        )


class MotionModule(nn.Module):
    """All temporal transformers of one file, under AnimateDiff's own weight names without `temporal_transformer`.

    It is never called itself: the patches of `injection` call the transformers one by one.
    """

    def __init__(
        self,
        config: MotionModuleConfig,
        name: str,
        *,
        operations: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.name = name

        def level(channels: tuple[int, ...]) -> MotionLevel:
            return MotionLevel(channels, config.max_frames, operations, device=device, dtype=dtype)

        self.down_blocks = nn.ModuleList(level(channels) for channels in config.down)
        self.mid_block = None if config.middle is None else level((config.middle,))
        self.up_blocks = nn.ModuleList(level(channels) for channels in config.up)
