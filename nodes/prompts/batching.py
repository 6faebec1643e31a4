"""One conditioning row per panel, so that a stock sampler draws panel i from prompt i. Host-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..host.text_rows import is_too_long_repeated, pad_rows_to_one_length, repeat_rows_to_one_length
from ..host.types import LENGTHS_KEY, Conditioning


def stack_conditioning(panels: Sequence[Conditioning]) -> Conditioning:
    """Merge the single-row CONDITIONING of every panel into one CONDITIONING with a row per panel.

    Prompts of another length are repeated to a common one; where that would be too long they are padded with zeros, and
    options say under `LENGTHS_KEY` where: attention must leave these out (`host.padded_text`). Tensors of the options
    that hold one row per prompt (SDXL's `pooled_output`, (1, C)) are stacked too.

    Raises:
        ValueError: if the panels' conditionings are made of different entries or options.
    """
    merged: Conditioning = []
    for entries in zip(*panels, strict=True):
        options = [entry[1] for entry in entries]
        rows, stacked = [entry[0] for entry in entries], _stack_options(options)
        if is_too_long_repeated(rows):
            merged.append([pad_rows_to_one_length(rows), {**stacked, LENGTHS_KEY: [row.shape[1] for row in rows]}])
        else:
            merged.append([repeat_rows_to_one_length(rows), stacked])
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
