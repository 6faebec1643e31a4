"""Checkpoints of a run: one file each, there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...atomic import PARTIAL, atomic_write

FOLDER = "checkpoints"


def save_state(out: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` iterations, then remove all but the newest `keep`.

    Args:
        out: folder of the run.
        step: iterations done.
        state: tensors and plain types.
        keep: checkpoints that stay.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    with atomic_write(path) as partial:
        torch.save({**state, "step": step}, partial)
    for old in _found(out)[:-keep]:
        old.unlink()
    for leftover in folder.glob(f"*{PARTIAL}"):
        leftover.unlink()
    return path


def load_latest(out: Path) -> dict[str, Any] | None:
    """The newest checkpoint's state on the CPU, its `step` among it, or None when there is none."""
    found = _found(out)
    return torch.load(found[-1], map_location="cpu", weights_only=True) if found else None


def _found(out: Path) -> list[Path]:
    return sorted((out / FOLDER).glob("step-*.pt"))
