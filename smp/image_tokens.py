"""IP-Adapter's two ways from an image encoder's output to cross-attention tokens.

Parameter names follow IP-Adapter's weight files, except that the resampler's `latents` [1, N, C] is an
embedding table `latents.weight` [N, C].
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import attend
from .config import ProjectionConfig, ResamplerConfig


class ImageProjection(nn.Module):
    """One image embedding -> a few tokens (IP-Adapter): a linear layer, split into tokens, LayerNorm."""

    def __init__(self, config: ProjectionConfig, *, operations: Any = nn, **factory: Any) -> None:
        """Args: the shape; where the layers come from; device and dtype."""
        super().__init__()
        self.config = config
        self.proj = operations.Linear(config.embed_width, config.tokens * config.width, **factory)
        self.norm = operations.LayerNorm(config.width, **factory)

    def forward(self, embeds: Tensor) -> Tensor:
        """(..., 1, embed_width), not normalised -> (..., tokens, width)."""
        return self.norm(rearrange(self.proj(embeds), "... 1 (n c) -> ... n c", n=self.config.tokens))


class PerceiverAttention(nn.Module):
    """The queries attend to the image's hidden states and to themselves."""

    def __init__(self, config: ResamplerConfig, operations: Any, **factory: Any) -> None:
        """Args: see `Resampler`."""
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.norm1 = operations.LayerNorm(config.hidden, **factory)
        self.norm2 = operations.LayerNorm(config.hidden, **factory)
        self.to_q = operations.Linear(config.hidden, inner, bias=False, **factory)
        self.to_kv = operations.Linear(config.hidden, 2 * inner, bias=False, **factory)
        self.to_out = operations.Linear(inner, config.hidden, bias=False, **factory)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Hidden states (B, T, hidden), queries (B, N, hidden) -> (B, N, hidden)."""
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), k, v, self.heads))


class Resampler(nn.Module):
    """The encoder's penultimate hidden states -> a fixed number of tokens (IP-Adapter Plus)."""

    def __init__(self, config: ResamplerConfig, *, operations: Any = nn, **factory: Any) -> None:
        """Args: the shape; where the layers come from; device and dtype."""
        super().__init__()
        self.config = config
        self.latents = operations.Embedding(config.queries, config.hidden, **factory)
        self.proj_in = operations.Linear(config.encoder_width, config.hidden, **factory)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(config, operations, **factory),
                    _feed_forward(config, operations, factory),
                ]
            )
            for _ in range(config.depth)
        )
        self.proj_out = operations.Linear(config.hidden, config.width, **factory)
        self.norm_out = operations.LayerNorm(config.width, **factory)
        if operations is nn:
            nn.init.normal_(self.latents.weight, std=config.hidden**-0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, encoder_width) -> (B, queries, width)."""
        x = self.proj_in(hidden_states)
        queries = self.latents(torch.arange(self.config.queries, device=x.device)).to(x.dtype)
        latents = queries.expand(x.shape[0], -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


def _feed_forward(config: ResamplerConfig, operations: Any, factory: dict[str, Any]) -> nn.Sequential:
    inner = config.ff_mult * config.hidden
    return nn.Sequential(
        operations.LayerNorm(config.hidden, **factory),
        operations.Linear(config.hidden, inner, bias=False, **factory),
        nn.GELU(),
        operations.Linear(inner, config.hidden, bias=False, **factory),
    )
