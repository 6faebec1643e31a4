"""Links to folders that need no special right on any system (standard library only)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def link_folder(link: Path, target: Path) -> None:
    """Make `link` lead to the folder `target`, replacing a link that leads elsewhere.

    Windows lets an ordinary user make a junction, but no symbolic link.
    """
    if os.path.lexists(link):
        if link.resolve() == target.resolve():
            return
        if not _is_link(link):
            raise FileExistsError(f"{link} is in the way of a link to {target}: move it elsewhere.")
        link.unlink() if link.is_symlink() else link.rmdir()
    link.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, capture_output=True)
    else:
        link.symlink_to(target, target_is_directory=True)


def _is_link(path: Path) -> bool:
    """Tell a symbolic link or a junction (no `Path.is_junction` before Python 3.12) from a real folder."""
    return path.is_symlink() or path.resolve() != path.parent.resolve() / path.name
