"""Import the pack as `storydiffusion`, with the host in front of sys.path.

The host loads a pack under its folder's path, so the pack has no import name of its own, and its `nodes`
folder would shadow the host's `nodes` module if the pack's root were ever on sys.path. Tests, benchmarks and
tools therefore see the pack through this alias and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

ALIAS = "storydiffusion"
PACK_ROOT = Path(__file__).resolve().parents[1]


def register(comfyui_path: Path) -> None:
    """Make `storydiffusion.*` and the host at `comfyui_path` importable in this process."""
    if not (comfyui_path / "comfy_api").is_dir():
        raise SystemExit(f"COMFYUI_PATH is {comfyui_path}, which holds no ComfyUI: run `python dev.py`.")
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PACK_ROOT]
    sys.path.insert(0, str(comfyui_path))
    package = ModuleType(ALIAS)
    package.__path__ = [str(PACK_ROOT)]
    sys.modules[ALIAS] = package


def start_comfy(*, cpu: bool) -> None:
    """Parse the host's command line before anything of it is imported: without `--cpu` it demands a GPU."""
    sys.argv = [sys.argv[0], *(["--cpu"] if cpu else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # parses now, while sys.argv is ours
