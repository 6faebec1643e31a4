"""ComfyUI with this pack and the small models, to try by hand: `storydiffusion.devtools.serve [PORT]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from .drivers.server import PACK_ROOT, ComfyServer, ServerError, check_port
from .tiny.checkpoints import ALL, ensure_checkpoint
from .toy.video_files import install_video_files


def main() -> None:
    models = PACK_ROOT / ".dev" / "models"
    port = int(sys.argv[1]) if len(sys.argv) > 1 else None
    comfyui = Path(os.environ["COMFYUI_PATH"])
    server = ComfyServer(comfyui, PACK_ROOT / ".dev" / "base", models, cpu=not torch.cuda.is_available(), port=port)
    try:
        check_port(server.port)  # before the checkpoints, which take half a minute the first time
        for checkpoint in ALL:
            ensure_checkpoint(checkpoint, models / "checkpoints")
        install_video_files(models)
        with server:
            print(f"\nComfyUI runs at {server.url} (Ctrl+C stops it).\n", flush=True)
            server.wait()
    except ServerError as error:
        sys.exit(f"serve: {error}")
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
