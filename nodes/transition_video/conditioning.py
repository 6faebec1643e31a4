"""The conditioning of one transition, out of the conditioning of all. Host-free."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..host.text_rows import repeat_rows_to_one_length
from ..host.types import LENGTHS_KEY, Conditioning


def conditioning_of_pair(conditioning: Conditioning, name: str, pair: int, pairs: int, frames: int) -> Conditioning:
    """What the frames of one transition are conditioned on.

    Args:
        conditioning: entries of (R, T, C). R = 1: all transitions share the row. R = pairs: transition i has row i.
            R = pairs + 1: a row for each panel, and in between the text goes evenly from one to the next. Tensors of
            an entry's options that hold R rows go along.
        name: the input's name, for the error.
        pair: the transition, from 0.
        pairs: how many there are.
        frames: frames of a transition.

    Returns:
        Entries of one row, or of one row per frame.

    Raises:
        ValueError: another number of rows.
    """
    chosen: Conditioning = []
    for states, options in conditioning:
        rows = states.shape[0]
        if rows not in (1, pairs, pairs + 1):
            raise ValueError(
                f"{name} has {rows} rows, but there are {pairs + 1} panels, and {pairs} transitions between them. "
                f"Connect a conditioning with one row for all of them, with {pairs} for the transitions, or with "
                f"{pairs + 1} for the panels."
            )
        if LENGTHS_KEY in options:
            chosen.append(_entry_of_pair(states, options, rows, pair, pairs, frames))
            continue
        if rows > 1:
            options = {key: _rows_of_pair(value, rows, pair, pairs, frames) for key, value in options.items()}
        chosen.append([_rows_of_pair(states, rows, pair, pairs, frames), options])
    return chosen


def _entry_of_pair(states: Tensor, options: dict[str, Any], rows: int, pair: int, pairs: int, frames: int) -> list[Any]:
    """The entry of a transition, out of rows that are padded with zeros: its own two are repeated to one length."""
    lengths = options[LENGTHS_KEY]
    needed = [pair] if rows == pairs else [pair, pair + 1]
    texts = repeat_rows_to_one_length([states[row : row + 1, : lengths[row]] for row in needed])
    rest = {key: value for key, value in options.items() if key not in (LENGTHS_KEY, "hooks")}
    rest = {key: _rows_of_pair(value, rows, pair, pairs, frames) for key, value in rest.items()}
    own = len(needed) - 1  # of these two rows alone there is one transition
    return [_rows_of_pair(texts, len(needed), 0, max(own, 1), frames), rest]


def _rows_of_pair(value: Any, rows: int, pair: int, pairs: int, frames: int) -> Any:
    if rows == 1 or not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != rows:
        return value
    if rows == pairs:
        return value[pair : pair + 1]
    weight = torch.linspace(0, 1, frames, device=value.device, dtype=value.dtype)
    return torch.lerp(value[pair], value[pair + 1], weight.reshape(-1, *[1] * (value.ndim - 1)))
