"""Prompts of different length as rows of one tensor. Host-free."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

MOST_REPEATED = 2
"""How many times as long as the longest prompt all may become by repetition."""


def repeat_rows_to_one_length(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack (1, T_i, C) embeddings to (B, T, C), T the least common multiple of the lengths.

    Shorter ones are repeated whole. Softmax over keys that all occur n times equals softmax over each once, so
    this changes no panel, where padding with empty prompts would.
    """
    length = math.lcm(*(row.shape[1] for row in rows))
    return torch.cat([row.repeat(1, length // row.shape[1], 1) for row in rows])


def pad_rows_to_one_length(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack (1, T_i, C) embeddings to (B, T, C), T the longest, with zeros behind the shorter ones."""
    length = max(row.shape[1] for row in rows)
    return torch.cat([F.pad(row, (0, 0, 0, length - row.shape[1])) for row in rows])


def is_too_long_repeated(rows: Sequence[torch.Tensor]) -> bool:
    """Whether repetition would cost much: prompts of 3, 4, 5 and 7 chunks would become 420 chunks each."""
    lengths = [row.shape[1] for row in rows]
    return math.lcm(*lengths) > MOST_REPEATED * max(lengths)
