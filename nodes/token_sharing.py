"""Consistent Self-Attention: the panels of a batch share tokens (StoryDiffusion, arXiv 2405.01434, equations 2 and 3).

Host-free. Panels are rows of a batch; a batch holds one or more chunks of the same panels (the conditional and
the unconditional half of classifier-free guidance), and panels only ever share within their chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Multi-head attention of projected queries (R, N, C) over keys and values (R, M, C), giving (R, N, C).

Its last argument is added to the logits: (1 or N, M), or None for nothing.
"""

KeyBias = Callable[[int, Sequence[int]], torch.Tensor | None]
"""For a reader and its pool of panels, what is added to the logits; see `subject_masks.shared_key_bias`."""


def sampled_token_count(tokens: int, rate: float) -> int:
    """Number of tokens that one panel of `tokens` tokens gives to each reader at sampling rate `rate` (0..1)."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"sampling_rate is {rate}; it must lie between 0 and 1.")
    return round(tokens * rate)


@dataclass(frozen=True)
class TokenDraw:
    """How one panel's tokens are divided: `sampled` (M,) go to its readers, `rest` (N - M,) stay with it.

    Both sorted int64 on the CPU; together every index of the panel once.
    """

    sampled: torch.Tensor
    rest: torch.Tensor


def draw_tokens(tokens: int, rate: float, *, draw: tuple[object, ...]) -> TokenDraw:
    """Draw the tokens that one source panel gives: RandSample of equation 2.

    The draw depends on `draw` alone (seed, step, block and panel): not on the device, on what ran before, or on
    the number of panels, so a panel gives the same tokens in every window it appears in.
    """
    count = sampled_token_count(tokens, rate)
    # Python's own hash() is salted per process; a digest is one number everywhere.
    digest = hashlib.blake2b(repr(draw).encode(), digest_size=7).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    order = torch.randperm(tokens, generator=generator)
    # Sorted: attention doesn't care about the order of keys, memory reads do.
    return TokenDraw(sampled=order[:count].sort().values, rest=order[count:].sort().values)


def grid_tokens(height: int, width: int, rate: float) -> TokenDraw:
    """The tokens (row-major) that a panel of height x width tokens gives if they lie on a regular grid.

    Tokens are taken in the order of an 8 x 8 Bayer matrix: at any rate as evenly spread as can be, at rate 0.5 the
    chequerboard. No chance, and the same tokens at every step.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rank = torch.zeros(height, width, dtype=torch.int64)
    for bit in range(3):
        row, column = rows >> bit & 1, columns >> bit & 1
        rank = rank * 4 + ((row ^ column) * 2 + row)
    order = rank.flatten().argsort(stable=True)
    count = sampled_token_count(height * width, rate)
    return TokenDraw(sampled=order[:count].sort().values, rest=order[count:].sort().values)


def all_other_panels(panels: int) -> list[list[int]]:
    """For each panel the panels it reads from: all the others, as in equation 2."""
    return [[source for source in range(panels) if source != reader] for reader in range(panels)]


def panels_sharing_a_character(
    characters: Sequence[Sequence[str]], references: Collection[int] = ()
) -> list[list[int]]:
    """For each panel the other panels that have at least one character in common with it.

    A panel without characters reads from none, and none reads from it. `references` names panels that are only read:
    given pictures, whose tokens must not change with the story drawn after them.
    """
    casts = [frozenset(names) for names in characters]
    return [
        [source for source, other in enumerate(casts) if source != reader and other & cast and reader not in references]
        for reader, cast in enumerate(casts)
    ]


def sources_within(panels: Sequence[int], sources: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """`sources` of a story restricted to a window of it: positions within `panels`, the window's panels in row order.

    With `sources` None every panel reads from all the others.
    """
    if sources is None:
        return all_other_panels(len(panels))
    position = {panel: row for row, panel in enumerate(panels)}
    return [[position[source] for source in sources[panel] if source in position] for panel in panels]


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
    sampled = torch.stack([draw.sampled for draw in draws]).to(q.device, non_blocking=True)  # (B, M)
    rest = torch.stack([draw.rest for draw in draws]).to(q.device, non_blocking=True)  # (B, N - M)
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
