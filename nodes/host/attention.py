"""The host's own attention, with the override that another node may have set where that is safe."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention
from torch import Tensor

from .types import Attend

OVERRIDE_KEY = "optimized_attention_override"
"""Entry of transformer_options: what another node has put in the place of the host's attention."""


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], bias: Tensor | None = None
) -> Tensor:
    """q (B, N, C), k and v (B, M, C), projected -> (B, N, C), before `to_out`; `bias` as in `Attend`.

    With a bias the host's own attention is asked, whatever override there is: some (Sage patches) hand on masks to
    kernels that swallow them, and the result would be that of no bias.
    """
    if bias is not None:
        extra_options = {key: value for key, value in extra_options.items() if key != OVERRIDE_KEY}
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
