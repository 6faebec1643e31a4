"""Draw a story with the shipped workflow, on a real headless server, into `output/`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from .server import PACK_ROOT, ComfyServer, PromptError, ServerError
from .tiny_checkpoints import TINY_SDXL, ensure_checkpoint
from .workflows import load_api_workflow, node_saving, on_small_model

WORKFLOW = "consistent_story_sdxl"
SIZE = 128
STEPS = 8


def draw_story(folder: Path) -> list[Path]:
    """Run the workflow on the small model; return the panels and the page that now lie in `folder`."""
    models = PACK_ROOT / ".dev" / "models"
    checkpoint = ensure_checkpoint(TINY_SDXL, models / "checkpoints")
    prompt = on_small_model(load_api_workflow(WORKFLOW), checkpoint, size=SIZE, steps=STEPS)
    log = PACK_ROOT / ".dev" / "demo-server.log"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        cpu = not torch.cuda.is_available()
        server = ComfyServer(Path(os.environ["COMFYUI_PATH"]), Path(temporary), models, cpu=cpu, log=log)
        print("[demo] starting ComfyUI", flush=True)
        with server:
            print("[demo] drawing: encoding the prompts, then sampling", flush=True)
            outputs = server.run(prompt, on_progress=show_progress)
            panels = server.image_paths(outputs, node_saving(prompt, "VAEDecode"))
            (page,) = server.image_paths(outputs, node_saving(prompt, "StoryContactSheet"))
            folder.mkdir(exist_ok=True)
            names = [f"panel_{number}.png" for number in range(1, len(panels) + 1)]
            copies = [(path, folder / name) for path, name in zip(panels, names, strict=True)]
            return [Path(shutil.copy(*pair)) for pair in [*copies, (page, folder / "page.png")]]


def show_progress(node: str, done: int, total: int) -> None:
    print(f"[demo] {node}: step {done} of {total}", flush=True)


def main() -> None:
    start = time.monotonic()
    try:
        paths = draw_story(PACK_ROOT / "output")
    except (ServerError, PromptError) as error:
        sys.exit(f"demo: {error}")
    print(f"[demo] done in {time.monotonic() - start:.0f} s. Pictures:")
    for path in paths:
        print(f"  {path}")


if __name__ == "__main__":
    main()
