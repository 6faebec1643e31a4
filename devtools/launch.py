"""Run a module of the pack against the host: `devtools/launch.py storydiffusion.benchmarks.NAME [args]`."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path


def main() -> None:
    sys.path[0] = str(Path(__file__).resolve().parent)
    import pack_alias  # type: ignore[import-not-found]

    del sys.path[0]
    if len(sys.argv) < 2 or "COMFYUI_PATH" not in os.environ:
        raise SystemExit("usage: COMFYUI_PATH=... python devtools/launch.py MODULE [args]")
    # Told to end, end as with Ctrl+C: a server that was started must be stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = sys.argv[1:]
    pack_alias.register(Path(os.environ["COMFYUI_PATH"]).resolve())
    import torch

    pack_alias.start_comfy(cpu=not torch.cuda.is_available())
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
