"""The paper's own sliding window, at the level of one attention layer. Host-free.

No node calls this, and none draws with it: it is Algorithm 1 as a tested pure function, kept for those who compare
with the paper. The nodes use `nodes/windows/` instead: here attention slides, but the rest of the model still sees
the whole story, so memory grows with it, and every layer costs about as much as `window` times plain attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from storydiffusion.nodes.consistent_attention.attention import consistent_self_attention
from storydiffusion.nodes.consistent_attention.sources import all_other_panels
from storydiffusion.nodes.consistent_attention.token_sampling import TokenDraw
from storydiffusion.nodes.host.types import Attend


def tiled_consistent_self_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    draws: Sequence[TokenDraw],
    attend: Attend,
) -> torch.Tensor:
    """Algorithm 1: tiles of `window` panels, one panel apart; each panel's result is the mean over its tiles.

    Inside a tile panels share as in equation 2. (Algorithm 1 as printed puts a panel's own tokens into the pool that
    is sampled for it, which equation 2 excludes; the equation is followed.)

    Args:
        q, k, v: (B, N, C), projected, of B panels.
        window: panels per tile; B or more is one tile, which is `consistent_self_attention`.
        draws: for each of the B panels, what it gives.
        attend: plain attention.

    Returns:
        (B, N, C)

    Raises:
        ValueError: if window is less than 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be 1 or more panels.")
    panels = q.shape[0]
    window = min(window, panels)
    total, tiles = torch.zeros_like(q), q.new_zeros(panels, 1, 1)
    for first in range(panels - window + 1):
        tile = slice(first, first + window)
        total[tile] += consistent_self_attention(
            q[tile],
            k[tile],
            v[tile],
            chunks=1,
            sources=all_other_panels(window),
            draws=draws[tile],
            attend=attend,
        )
        tiles[tile] += 1
    return total / tiles
