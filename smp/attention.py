"""Multi-head attention on projected queries, keys and values."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention: (B, T, heads * d), (B, S, heads * d) twice -> (B, T, heads * d)."""
    q, k, v = (rearrange(x, "b t (h d) -> b h t d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)")
