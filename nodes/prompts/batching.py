"""One conditioning row per panel, so that a stock sampler draws panel i from prompt i. Host-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..host.types import Conditioning


def stack_rows(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack (1, T_i, C) embeddings to (B, T, C), T the least common multiple of the lengths.

    Shorter ones are repeated whole. Softmax over keys that all occur n times equals softmax over each once, so
    this changes no panel, where padding with empty prompts would.
    """
    length = math.lcm(*(row.shape[1] for row in rows))
    return torch.cat([row.repeat(1, length // row.shape[1], 1) for row in rows])


def stack_conditioning(panels: Sequence[Conditioning]) -> Conditioning:
    """Merge the single-row CONDITIONING of every panel into one CONDITIONING with a row per panel.

    Tensors of the options that hold one row per prompt (SDXL's `pooled_output`, (1, C)) are stacked too.

    Raises:
        ValueError: if the panels' conditionings are made of different entries or options.
    """
    merged: Conditioning = []
    for entries in zip(*panels, strict=True):
        options = [entry[1] for entry in entries]
        merged.append([stack_rows([entry[0] for entry in entries]), _stack_options(options)])
    return merged


def _stack_options(options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = options[0]
    if any(other.keys() != first.keys() for other in options):
        names = sorted(set().union(*options))
        raise ValueError(f"The text encoder gave the panels different kinds of options, out of: {', '.join(names)}.")
    return {
        name: torch.cat([other[name] for other in options]) if isinstance(value, torch.Tensor) else value
        for name, value in first.items()
    }


def repeat_rows(conditioning: Conditioning, count: int) -> Conditioning:
    """`conditioning` of one prompt, with `count` equal rows."""
    return stack_conditioning([conditioning] * count)
