"""The main job on a real headless server, into `output/`: a story, its video, and both without what this pack adds."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from ..drivers.server import PACK_ROOT, ComfyServer, Prompt, PromptError, ServerError
from ..toy.video_files import install_video_files
from ..workflows.shipped import load_api_workflow, node_saving, on_toy_world, with_inputs
from .progress import announce, show_progress
from .video import draw_videos

# In the words that the toy world's model has learned. What the sheet leaves open (hair, trousers, shoes, ...) is free
# in every panel: without sharing, each panel makes it up anew.
CHARACTERS = """\
[Bob] a man with a red hat
[Alice] a woman with a yellow dress
"""
STORY = """\
[Bob] standing, in the middle, by the sea #Bob looks out to sea.
[Alice] waving, on the left, in the city #Far away, Alice waves goodbye.
[Bob] walking, on the right, in the forest #He sets out through the forest,
[Bob] jumping, on the left, in the snow #over the mountains,
[Alice] cheering, in the middle, in the desert #while she crosses the desert.
[Alice] standing, on the right, at night #At night she waits for him.
"""


def story_prompt() -> Prompt:
    """The shipped workflow; loader, picture size and story are the toy world's, all else is as shipped."""
    return on_toy_world(load_api_workflow("consistent_story_sdxl"), story=STORY, characters=CHARACTERS)


def draw_story(server: ComfyServer, folder: Path) -> list[Path]:
    """Panels and page of the story, and the page of the same story with nothing shared."""
    prompt = story_prompt()
    announce("drawing the story with Consistent Self-Attention")
    outputs = server.run(prompt, on_progress=show_progress)
    panels = server.image_paths(outputs, node_saving(prompt, "VAEDecode"))
    (page,) = server.image_paths(outputs, node_saving(prompt, "StoryContactSheet"))
    announce("drawing it again without (sampling_rate 0: the stock model, same seed)")
    alone = with_inputs(prompt, {"StoryApplyConsistentSelfAttention": {"sampling_rate": 0.0}})
    outputs = server.run(alone, on_progress=show_progress)
    (page_without,) = server.image_paths(outputs, node_saving(prompt, "StoryContactSheet"))

    names = [f"panel_{number}.png" for number in range(1, len(panels) + 1)]
    copies = [*zip(panels, names, strict=True), (page, "page.png"), (page_without, "page_without_sharing.png")]
    written = [Path(shutil.copy(path, folder / name)) for path, name in copies]
    return [*written, side_by_side(page_without, page, folder / "without_and_with_sharing.png")]


def side_by_side(left: Path, right: Path, target: Path) -> Path:
    """Write both pages next to one another."""
    pages = [Image.open(path) for path in (left, right)]
    both = Image.new("RGB", (sum(page.width for page in pages), max(page.height for page in pages)), "white")
    both.paste(pages[0], (0, 0))
    both.paste(pages[1], (pages[0].width, 0))
    both.save(target)
    return target


def main() -> None:
    start = time.monotonic()
    models, folder = PACK_ROOT / ".dev" / "models", PACK_ROOT / "output"
    install_video_files(models)
    folder.mkdir(exist_ok=True)
    cpu = not torch.cuda.is_available()
    log = PACK_ROOT / ".dev" / "demo-server.log"
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            announce("starting ComfyUI")
            with ComfyServer(Path(os.environ["COMFYUI_PATH"]), Path(temporary), models, cpu=cpu, log=log) as server:
                paths = [*draw_story(server, folder), *draw_videos(server, folder)]
    except (ServerError, PromptError) as error:
        sys.exit(f"demo: {error}")
    announce(f"done in {time.monotonic() - start:.0f} s:")
    for path in paths:
        print(f"  {path}")


if __name__ == "__main__":
    main()
