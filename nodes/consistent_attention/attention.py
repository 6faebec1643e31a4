"""Consistent Self-Attention: the panels of a batch share tokens (StoryDiffusion, arXiv 2405.01434, equations 2 and 3).

Host-free. Panels are rows of a batch; a batch holds one or more chunks of the same panels (the conditional and
the unconditional half of classifier-free guidance), and panels only ever share within their chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..host.types import Attend
from .token_sampling import TokenDraw

KeyBias = Callable[[int, Sequence[int]], torch.Tensor | None]
"""For a reader and its pool of panels, what is added to the logits; see `key_bias.shared_key_bias`."""


def readers_by_pool(sources: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Panels that read from the same pool of panels, themselves included; panels without sources are left out."""
    pools: dict[tuple[int, ...], list[int]] = {}
    for reader, readable in enumerate(sources):
        if readable:
            pools.setdefault(tuple(sorted({reader, *readable})), []).append(reader)
    return pools


def consistent_self_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    chunks: int,
    sources: Sequence[Sequence[int]],
    draws: Sequence[TokenDraw],
    attend: Attend,
    key_bias: KeyBias | None = None,
) -> torch.Tensor:
    """O_i = Attention(Q_i, K_Pi, V_Pi) with P_i = [S_i, I_i] (equation 3), on projected tensors.

    Keys and values are projected once, by the caller, and gathered here; a projection acts on each token alone, so
    this equals projecting the gathered tokens. S_i is made of one draw per *source* panel, which all its readers
    share (as the official code's gather does); a panel's own tokens are always all there.

    A reader's own sampled tokens are keys of its own as well, so P_i is the sampled tokens of the whole pool, the
    same for every reader of the pool, and the rest of its own: only that rest is copied anew for each reader.
    Beside its result this needs the keys and values of a single reader.

    Args:
        q, k, v: (chunks * B, N, C) for B panels of N tokens; rows are chunk-major.
        chunks: how many times the B panels follow one another in the batch.
        sources: for each of the B panels, the panels it reads from.
        draws: for each of the B panels, what it gives; all give the same number of tokens.
        attend: plain attention; it must not keep k and v, whose memory the next reader gets.
        key_bias: what weakens or excludes other panels' keys; None: nothing.

    Returns:
        (chunks * B, N, C)

    Raises:
        ValueError: if the rows are not `chunks` times the number of panels.
    """
    panels = len(sources)
    if q.shape[0] != chunks * panels:
        raise ValueError(
            f"The batch has {q.shape[0]} rows, which is not {chunks} times the {panels} panels that share tokens."
        )
    pools = readers_by_pool(sources)
    if not pools:
        return attend(q, k, v, None)

    q, k, v = (tensor.unflatten(0, (chunks, panels)) for tensor in (q, k, v))  # (chunks, B, N, C)
    sampled = torch.stack([draw.sampled for draw in draws]).to(q.device)  # (B, M)
    rest = torch.stack([draw.rest for draw in draws]).to(q.device)  # (B, N - M)
    out = torch.empty_like(q)
    for pool, readers in pools.items():
        shared = sampled.shape[1] * len(pool)
        paired_k, paired_v = (tensor.new_empty(chunks, shared + rest.shape[1], q.shape[-1]) for tensor in (k, v))
        for paired, tensor in ((paired_k, k), (paired_v, v)):
            paired[:, :shared] = torch.cat([tensor[:, panel, sampled[panel]] for panel in pool], dim=1)
        for reader in readers:
            paired_k[:, shared:] = k[:, reader, rest[reader]]
            paired_v[:, shared:] = v[:, reader, rest[reader]]
            bias = key_bias(reader, pool) if key_bias else None
            out[:, reader] = attend(q[:, reader], paired_k, paired_v, bias)
    alone = [panel for panel, readable in enumerate(sources) if not readable]
    if alone:
        alone_q, alone_k, alone_v = (tensor[:, alone].flatten(0, 1) for tensor in (q, k, v))
        out[:, alone] = attend(alone_q, alone_k, alone_v, None).unflatten(0, (chunks, len(alone)))
    return out.flatten(0, 1)
