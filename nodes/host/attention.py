"""The host's own attention, with the override that another node may have set."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention
from torch import Tensor

from .types import Attend


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], bias: Tensor | None = None
) -> Tensor:
    """q (B, N, C), k and v (B, M, C), projected -> (B, N, C), before `to_out`; `bias` as in `Attend`."""
    return comfy.ldm.modules.attention.optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        mask=bias,
        attn_precision=extra_options["attn_precision"],
        transformer_options=extra_options,
    )


def attention_of_call(extra_options: dict[str, Any]) -> Attend:
    """The host's attention with the heads, precision and override of the running block."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return plain_attention(q, k, v, extra_options, bias)

    return attend
