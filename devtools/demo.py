"""The main job on a real headless server, into `output/`: a story, the same without sharing, and videos."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from .server import PACK_ROOT, ComfyServer, Prompt, PromptError, ServerError
from .tiny_checkpoints import ensure_checkpoint
from .tiny_motion import TINY_SD15_VIDEO, TINY_V2, ensure_motion_module
from .tiny_smp import TINY_BASE, ensure_ip_adapter
from .workflows import TOY_SIZE, load_api_workflow, node_of, node_saving, on_small_model, on_toy_world, with_inputs

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
VIDEO_SIZE = 64
VIDEO_STEPS = 4
VIDEO_FRAMES = 8


def story_prompt() -> Prompt:
    """The shipped workflow; loader, picture size and story are the toy world's, all else is as shipped."""
    return on_toy_world(load_api_workflow("consistent_story_sdxl"), story=STORY, characters=CHARACTERS)


def clip_prompt(models: Path) -> Prompt:
    """The shipped AnimateDiff workflow on small models."""
    workflow = load_api_workflow("animatediff_text_to_video_sd15")
    checkpoint = ensure_checkpoint(TINY_SD15_VIDEO, models / "checkpoints")
    ensure_motion_module(TINY_V2, models / "animatediff_models")
    small = on_small_model(workflow, checkpoint, size=VIDEO_SIZE, steps=VIDEO_STEPS)
    return with_inputs(small, {"StoryLoadMotionModule": {"motion_module_name": TINY_V2.file_name}})


def story_video_prompt(models: Path) -> Prompt:
    """The whole paper in one graph: panels on the toy world, transitions on small models."""
    ensure_ip_adapter(TINY_BASE, models / "ipadapter")
    prompt = with_inputs(
        load_api_workflow("story_to_video"),
        {
            "CheckpointLoaderSimple": {"ckpt_name": TINY_SD15_VIDEO.file_name},
            "StoryLoadMotionModule": {"motion_module_name": TINY_V2.file_name},
            "StoryLoadSMP": {"ip_adapter": TINY_BASE.file_name},
            "ImageScale": {"width": VIDEO_SIZE, "height": VIDEO_SIZE},
            "StorySemanticMotionPredictor": {"frames": VIDEO_FRAMES},
            "StorySMPVideoDecode": {"steps": VIDEO_STEPS},
            "StoryPromptSplitter": {"story": "\n".join(STORY.splitlines()[:3]), "characters": CHARACTERS},
            "EmptyLatentImage": {"width": TOY_SIZE, "height": TOY_SIZE},
        },
    )
    prompt[node_of(prompt, "CLIPVisionLoader")] = {"class_type": "StoryTinyCLIPVision", "inputs": {}}
    # The loader that feeds Consistent Self-Attention draws the panels; the other one the video.
    panel_loader = prompt[node_of(prompt, "StoryApplyConsistentSelfAttention")]["inputs"]["model"][0]
    prompt[panel_loader] = {"class_type": "StoryToyLoader", "inputs": {}}
    return prompt


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


def draw_videos(server: ComfyServer, models: Path, folder: Path) -> list[Path]:
    """A clip through the motion module, and the video of the story's first three panels."""
    announce("sampling videos (random weights: they show that everything runs, and look like noise)")
    prompts = {"clip.mp4": clip_prompt(models), "story.mp4": story_video_prompt(models)}
    written = []
    for name, prompt in prompts.items():
        outputs = server.run(prompt, on_progress=show_progress)
        (video,) = server.image_paths(outputs, node_of(prompt, "SaveVideo"))
        written.append(Path(shutil.copy(video, folder / name)))
    return written


def announce(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def show_progress(node: str, done: int, total: int) -> None:
    announce(f"{node}: step {done} of {total}")


def main() -> None:
    start = time.monotonic()
    models, folder = PACK_ROOT / ".dev" / "models", PACK_ROOT / "output"
    models.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    cpu = not torch.cuda.is_available()
    log = PACK_ROOT / ".dev" / "demo-server.log"
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            announce("starting ComfyUI")
            with ComfyServer(Path(os.environ["COMFYUI_PATH"]), Path(temporary), models, cpu=cpu, log=log) as server:
                paths = [*draw_story(server, folder), *draw_videos(server, models, folder)]
    except (ServerError, PromptError) as error:
        sys.exit(f"demo: {error}")
    announce(f"done in {time.monotonic() - start:.0f} s:")
    for path in paths:
        print(f"  {path}")


if __name__ == "__main__":
    main()
