"""Files that appear under their name only once they are complete, also when the machine loses power."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

PARTIAL = ".partial"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path to write to; it becomes `path` when the block ends without an error.

    The path is nobody else's, so processes may write the same file at once: the last one's stands. What a killed
    process leaves behind is a hidden file ending in `.partial`.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
    try:
        partial.touch(exist_ok=False)
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)  # safetensors puts a file of its own there, which only its owner may read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
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
