"""Cross-attention with added keys and values (StoryDiffusion, equation 6), on projected tensors.

T are a row's text tokens, P its frame's motion tokens. Two ways to let P in:

- concat (equation 6): one softmax over [T, P]. For projections trained that way.
- decoupled (IP-Adapter): attention to T plus strength times attention to P. For IP-Adapter's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..host.types import Attend

TEXT_CHUNK = 77
"""Tokens of one CLIP text chunk: SD1.5 conditioning is a whole number of them."""


def concat_attention(
    q: Tensor,
    text: tuple[Tensor, Tensor],
    motion: tuple[Tensor, Tensor],
    attend: Attend,
    *,
    strength: float = 1.0,
    text_repeats: Sequence[int] | None = None,
) -> Tensor:
    """Equation 6: one softmax over the text's and the motion's keys.

    Args:
        q: (B, Q, C) projected queries.
        text: keys and values of the text, (B, T, C) each.
        motion: added keys and values, (B, P, C) each.
        attend: attention over given keys.
        strength: weight of P against T inside the softmax, added to P's logits as its logarithm; at 0 the
            result is exactly `attend` over the text.
        text_repeats: for each row, how many times its text is repeated to fill T. Repeats change nothing in a
            softmax over text alone, but next to P they would multiply the text's weight: it is divided by
            them.

    Returns:
        (B, Q, C).

    Raises:
        ValueError: a negative strength.
    """
    _require_strength(strength)
    if strength == 0:
        return attend(q, *text, None)
    k, v = (torch.cat(pair, dim=1) for pair in zip(text, motion, strict=True))
    text_bias = [-math.log(repeats) for repeats in text_repeats or [1]]
    motion_bias = math.log(strength)
    if motion_bias == 0 and not any(text_bias):
        return attend(q, k, v, None)  # without a mask the fastest kernels stay in reach
    text_columns = q.new_tensor(text_bias)[:, None, None].expand(-1, q.shape[1], text[0].shape[1])
    motion_columns = q.new_full((), motion_bias).expand(len(text_bias), q.shape[1], motion[0].shape[1])
    return attend(q, k, v, torch.cat([text_columns, motion_columns], dim=-1))


def decoupled_attention(
    base: Tensor, q: Tensor, motion: tuple[Tensor, Tensor], attend: Attend, *, strength: float = 1.0
) -> Tensor:
    """IP-Adapter's way: the text's attention plus `strength` times a second attention, to P alone.

    Args:
        base: (B, Q, C), attention to the text.
        q: (B, Q, C) projected queries.
        motion: added keys and values, (B, P, C) each.
        attend: attention over given keys.
        strength: at 0 the result is `base` itself.

    Returns:
        (B, Q, C).

    Raises:
        ValueError: a negative strength.
    """
    _require_strength(strength)
    if strength == 0:
        return base
    return base + strength * attend(q, *motion, None)


def count_text_repeats(context: Tensor) -> list[int] | None:
    """How often each row's text was repeated to reach the batch's common length.

    The host repeats a shorter conditioning's chunks until all rows are as long as their least common
    multiple.

    Args:
        context: (B, T, C) text tokens before projection.

    Returns:
        One count for each row, or None when T is a single chunk (nothing can have been repeated) or is not
        made of chunks. A row whose chunks are all alike counts as one chunk, whoever repeated it.
    """
    chunks, rest = divmod(context.shape[1], TEXT_CHUNK)
    if rest or chunks < 2:
        return None
    repeats = [1] * context.shape[0]
    for period in (d for d in range(chunks - 1, 0, -1) if chunks % d == 0):  # the shortest period is found last
        shifted = context[:, period * TEXT_CHUNK :] == context[:, : -period * TEXT_CHUNK]
        for row, same in enumerate(shifted.flatten(1).all(dim=1).tolist()):
            if same:
                repeats[row] = chunks // period
    return repeats


def tokens_of_rows(tokens: Tensor, uncond: Tensor, indices: Sequence[int], positive: Sequence[bool]) -> Tensor:
    """P for every row of a model call.

    Args:
        tokens: (F, N, C), P_1..P_F.
        uncond: (N, C), what the unconditional rows get in every frame.
        indices: frame number of each row of a chunk.
        positive: for each chunk whether it is one of the positive prompt.

    Returns:
        (chunks * rows, N, C).
    """
    frames = tokens[list(indices)]
    blank = uncond.expand_as(frames)
    return torch.cat([frames if chunk else blank for chunk in positive])


def _require_strength(strength: float) -> None:
    if strength < 0:
        raise ValueError(f"strength is {strength}; it must be 0 or more.")
