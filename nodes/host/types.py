"""Names for what the host hands around; imports nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Conditioning = list[tuple[Tensor, dict[str, Any]] | list[Any]]
"""CONDITIONING: entries of cross-attention states (rows, tokens, width) and options."""

LENGTHS_KEY = "storydiffusion_text_lengths"
"""Entry of a conditioning's options: for each row, how many of its tokens are text; those behind are zeros."""

Latent = dict[str, Any]
"""LATENT: `samples` (B, C, H, W), optionally `noise_mask` and `batch_index`."""

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""Multi-head attention of projected queries (B, N, C) over keys and values (B, M, C), giving (B, N, C).

Its last argument is added to the logits: (1 or B, 1 or N, M) or (1 or N, M), or None for nothing. How many heads there
are is its own business.
"""

AttentionReplacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
"""An `attn1_replace` or `attn2_replace` patch: projected q, k, v and the call's options -> as `Attend`."""
