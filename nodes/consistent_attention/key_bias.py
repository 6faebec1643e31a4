"""What weakens or excludes other panels' keys in a reader's softmax. Host-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def shared_key_bias(
    reader: int,
    pool: Sequence[int],
    *,
    shared: int,
    own: int,
    weights: Sequence[float],
    readable: Callable[[int], torch.Tensor] | None,
    like: torch.Tensor,
) -> torch.Tensor | None:
    """What to add to a reader's attention logits, (1 or N, len(pool) * shared + own), or None for nothing.

    Keys lie as in `consistent_self_attention`: `shared` tokens of each panel of the pool, the reader among them,
    then `own` more of its own.

    Args:
        weights: for each panel of the pool, the weight of its keys in the softmax, relative to the reader's own (0
            excluded); the reader's entry is not looked at.
        readable: gives, for another panel of the pool, `may_read` of its shared tokens; None: everything.
        like: dtype and device of the result.
    """
    if readable is None and all(weight == 1 for source, weight in zip(pool, weights, strict=True) if source != reader):
        return None
    # Not -inf: kernels that go through the keys in pieces divide by zero where a whole piece is excluded.
    excluded = torch.finfo(like.dtype).min / 2
    columns = []
    for source, weight in zip(pool, map(math.log, weights), strict=True):
        if source == reader:
            columns.append(like.new_zeros(1, shared))
        elif readable is None:
            columns.append(like.new_full((1, shared), weight))
        else:
            columns.append(torch.where(readable(source), weight, excluded).to(like))
    columns.append(like.new_zeros(1, own))
    rows = max(column.shape[0] for column in columns)
    return torch.cat([column.expand(rows, -1) for column in columns], dim=1)
