"""Which tokens a panel gives to its readers: RandSample of equation 2 (StoryDiffusion, arXiv 2405.01434). Host-free."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


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
