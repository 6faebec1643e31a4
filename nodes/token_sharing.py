"""Consistent Self-Attention: the panels of a batch share tokens (StoryDiffusion, arXiv 2405.01434, equations 2 and 3).

Host-free. Panels are rows of a batch; a batch holds one or more chunks of the same panels (the conditional and
the unconditional half of classifier-free guidance), and panels only ever share within their chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Multi-head attention of projected queries (R, N, C) over keys and values (R, M, C), giving (R, N, C)."""


def sampled_token_count(tokens: int, rate: float) -> int:
    """Number of tokens that one panel of `tokens` tokens gives to each reader at sampling rate `rate` (0..1)."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"sampling_rate is {rate}; it must lie between 0 and 1.")
    return round(tokens * rate)


def sample_tokens(tokens: int, rate: float, *, draw: tuple[object, ...]) -> torch.Tensor:
    """Draw token indices of one source panel: RandSample of equation 2.

    The draw depends on `draw` alone (seed, step, block and panel): not on the device, on what ran before, or on
    the number of panels, so a panel gives the same tokens in every window it appears in.

    Returns (M,) sorted int64 indices on the CPU, M = `sampled_token_count`, without repetition.
    """
    count = sampled_token_count(tokens, rate)
    # Python's own hash() is salted per process; a digest is one number everywhere.
    digest = hashlib.blake2b(repr(draw).encode(), digest_size=7).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    # Sorted: attention doesn't care about the order of keys, memory reads do.
    return torch.randperm(tokens, generator=generator)[:count].sort().values


def all_other_panels(panels: int) -> list[list[int]]:
    """For each panel the panels it reads from: all the others, as in equation 2."""
    return [[source for source in range(panels) if source != reader] for reader in range(panels)]


def panels_sharing_a_character(characters: Sequence[Sequence[str]]) -> list[list[int]]:
    """For each panel the other panels that have at least one character in common with it.

    A panel without characters reads from none, and none reads from it.
    """
    casts = [frozenset(names) for names in characters]
    return [
        [source for source, other in enumerate(casts) if source != reader and other & cast]
        for reader, cast in enumerate(casts)
    ]


def consistent_self_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    chunks: int,
    sources: Sequence[Sequence[int]],
    sampled: Sequence[torch.Tensor],
    attend: Attend,
) -> torch.Tensor:
    """O_i = Attention(Q_i, K_Pi, V_Pi) with P_i = [S_i, I_i] (equation 3), on projected tensors.

    Keys and values are projected once, by the caller, and gathered here; a projection acts on each token alone, so
    this equals projecting the gathered tokens. S_i is made of one draw per *source* panel, which all its readers
    share (as the official code's gather does); a panel's own tokens are always all there. Beside its result it
    needs the keys and values of a single reader at a time.

    Args:
        q, k, v: (chunks * B, N, C) for B panels of N tokens; rows are chunk-major.
        chunks: how many times the B panels follow one another in the batch.
        sources: for each of the B panels, the panels it reads from.
        sampled: for each of the B panels, (M,) indices of the tokens it gives.
        attend: plain attention; also called for panels that read from no other.

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
    if not any(sources):
        return attend(q, k, v)

    q, k, v = (tensor.unflatten(0, (chunks, panels)) for tensor in (q, k, v))  # (chunks, B, N, C)
    given = sorted({source for readable in sources for source in readable})
    indices = {panel: sampled[panel].to(k.device) for panel in given}
    shared_k = {panel: k[:, panel].index_select(1, indices[panel]) for panel in given}  # each (chunks, M, C)
    shared_v = {panel: v[:, panel].index_select(1, indices[panel]) for panel in given}

    out = torch.empty_like(q)
    for reader, readable in enumerate(sources):
        k_paired = torch.cat([k[:, reader], *(shared_k[panel] for panel in readable)], dim=1)
        v_paired = torch.cat([v[:, reader], *(shared_v[panel] for panel in readable)], dim=1)
        out[:, reader] = attend(q[:, reader], k_paired, v_paired)
    return out.flatten(0, 1)
