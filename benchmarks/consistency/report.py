"""A benchmark's table: as Markdown, as numbers, and as a sheet of its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ...devtools.toy.palette import Array
from .metrics import Figure
from .sampling import Sampling


@dataclass
class Table:
    """Rows that are measured alike."""

    columns: dict[str, str]
    """Each metric's number format."""
    rows: dict[str, dict[str, Figure]] = field(default_factory=dict)
    images: dict[str, Array] = field(default_factory=dict)


def as_markdown(rows: dict[str, dict[str, Figure]], columns: dict[str, str]) -> str:
    """The rows as a Markdown table; `columns` gives each metric's number format."""
    lines = ["| setting | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in rows.items():
        cells = (_cell(figures[column], spec) for column, spec in columns.items())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: Figure, spec: str) -> str:
    return f"{figure.mean:{spec}}" if np.isnan(figure.error) else f"{figure:{spec}}"


def contact_sheet(columns: Sequence[Array], *, stories: int = 6, panels: int = 4, enlarged: int = 4) -> Image.Image:
    """Stories as rows; one block of panels per entry of `columns`, side by side."""
    blocks = []
    for images in columns:
        shown = np.pad(images[: stories * panels], ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=1)
        rows = shown.reshape(-1, panels, *shown.shape[1:]).transpose(0, 2, 1, 3, 4)
        blocks.append(rows.reshape(len(rows) * rows.shape[1], -1, 3))
        blocks.append(np.ones((len(rows) * rows.shape[1], 3, 3), dtype=np.float32))
    sheet = np.concatenate(blocks[:-1], axis=1).repeat(enlarged, 0).repeat(enlarged, 1)
    return Image.fromarray((sheet * 255).round().astype(np.uint8))


def save(table: Table, folder: Path, name: str, sampling: Sampling) -> None:
    """Print a table and write it, as Markdown, as numbers, and as a sheet of its pictures."""
    text = as_markdown(table.rows, table.columns)
    print(f"\n{name}\n\n{text}\n", flush=True)
    (folder / f"{name}.md").write_text(text + "\n")
    figures = {row: {key: asdict(value) for key, value in known.items()} for row, known in table.rows.items()}
    (folder / f"{name}.json").write_text(json.dumps({"sampling": asdict(sampling), "rows": figures}, indent=1))
    if table.images:
        contact_sheet(list(table.images.values())[:4], panels=4).save(folder / f"{name}.png")
