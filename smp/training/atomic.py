"""Files that appear under their name only once they are complete, also when the machine loses power."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path to write to; it becomes `path` when the block ends without an error.

    What an ended process leaves behind is one file ending in `.partial`, which the next try overwrites.
    """
    partial = path.with_name(path.name + PARTIAL)
    yield partial
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """Make the new name itself last. Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
