"""Tables of measured scores beside published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .clip_scores import Scores


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error (NaN for a single value)."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        """For a table."""
        return f"{self.mean:.4f}" if math.isnan(self.error) else f"{self.mean:.4f} ± {self.error:.4f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error (sample standard deviation over the root of n); ValueError without values."""
    count = len(values)
    if not count:
        raise ValueError("There are no values to average.")
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(mean, math.sqrt(variance / count), count)


def summarise(rows: Sequence[Scores]) -> dict[str, Mean]:
    """Mean of every score over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean_of([row[name] for row in rows if name in row]) for name in names}


def format_table(measured: Mapping[str, Mapping[str, Mean]], published: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table: a row for each method, measured ones first; '-' where there is no figure."""
    columns = list(dict.fromkeys(name for row in [*measured.values(), *published.values()] for name in row))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for method, row in measured.items():
        lines.append(f"| {method} | " + " | ".join(str(row.get(name, "-")) for name in columns) + " |")
    for method, figures in published.items():
        cells = (f"{figures[name]:.4f}" if name in figures else "-" for name in columns)
        lines.append(f"| {method} (published) | " + " | ".join(cells) + " |")
    return "\n".join(lines)
