"""What all processes that fill one folder must agree on: written by the first of them, compared by the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...atomic import write_json
from .shards import INDEX

PLAN = "plan.json"
SHOWN_CHARACTERS = 40  # of a value in an error; digests are longer and say nothing to a reader


def agree_on_plan(out: Path, settings: dict[str, Any], computed: dict[str, Any]) -> dict[str, Any]:
    """Begin a folder, or make sure that it was begun with the same settings.

    Args:
        out: the folder.
        settings: what must be the same, as JSON stores it.
        computed: what the settings lead to but for rounding, which differs between devices and numbers of threads.

    Returns:
        `computed` of the process that began the folder.

    Raises:
        ValueError: the folder was begun with other settings (they are named), or was not made here.
    """
    path = out / PLAN
    with FileLock(out / f".{PLAN}.lock"):
        if not path.is_file():
            if (out / INDEX).exists():
                raise ValueError(f"{out} holds shards that were not made here; choose another folder.")
            write_json(path, {"settings": settings, "computed": computed})
        plan = json.loads(path.read_text(encoding="utf-8"))
    changes = _changes(_flat(plan["settings"]), _flat(settings))
    if changes:
        raise ValueError(
            f"{out} was begun with other settings ({'; '.join(changes)}). Set them back to go on with it; to use the "
            "new ones, name another folder or delete this one."
        )
    return plan["computed"]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*before, *now])
    return [_change(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def _change(name: str, before: Any, now: Any) -> str:
    shown = f"{name}: {before!r} -> {now!r}"
    return shown if len(shown) <= len(name) + SHOWN_CHARACTERS else f"{name} changed"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
