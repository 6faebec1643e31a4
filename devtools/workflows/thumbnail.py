"""Make the thumbnails of the shipped workflows, from the canvas of the real front end.

`storydiffusion.devtools.workflows.thumbnail NAME ...` writes workflows/NAME.jpg: all groups but the first, which holds
model loaders and notes, with larger titles than on the canvas, because templates are shown small.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

from ..drivers.browser import FrontEnd, find_chromium, open_front_end
from ..drivers.server import ComfyServer
from .example_inputs import write_example_inputs
from .shipped import WORKFLOWS, api_workflow_names, load_api_workflow

WIDTH = 1400
"""Of a thumbnail, pixels; the height follows."""
LARGEST_FILE = 200_000
WIDEST = 3.2
"""Width by height from which on the groups stand in two rows."""
SETTINGS = {
    "Comfy.Minimap.Visible": False,
    "Comfy.TextareaWidget.FontSize": 19,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
MODEL_FOLDERS = {
    ("CheckpointLoaderSimple", "ckpt_name"): "checkpoints",
    ("ControlNetLoader", "control_net_name"): "controlnet",
    ("StoryLoadMotionModule", "motion_module_name"): "animatediff_models",
    ("StoryLoadSMP", "ip_adapter"): "ipadapter",
    ("CLIPVisionLoader", "clip_name"): "clip_vision",
    ("CLIPLoader", "clip_name"): "text_encoders",
    ("UNETLoader", "unet_name"): "diffusion_models",
    ("VAELoader", "vae_name"): "vae",
}
# The bars of the window lie over the canvas: keep off them.
LEFT, TOP, RIGHT, BOTTOM = 90, 120, 460, 120

FRAME = """async ([left, top]) => {
    LiteGraph.NODE_TEXT_SIZE = 19;
    LiteGraph.GROUP_TEXT_SIZE = 32;
    const shown = [...app.graph.groups].sort((a, b) => a.pos[0] - b.pos[0]).slice(1);
    const margin = 16;
    const x = Math.min(...shown.map((group) => group.pos[0])) - margin;
    const y = Math.min(...shown.map((group) => group.pos[1])) - margin;
    const width = Math.max(...shown.map((group) => group.pos[0] + group.size[0])) + margin - x;
    const height = Math.max(...shown.map((group) => group.pos[1] + group.size[1])) + margin - y;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [left - x, top - y];
    app.canvas.setDirty(true, true);
    const boxes = shown.map((group) => [group.pos[0] - x, group.pos[1] - y, ...group.size]);
    return { width, height, boxes };
}"""


def make_placeholders(models: Path) -> None:
    """Write an empty file for each model that a workflow names: the canvas marks the missing ones in red."""
    for name in api_workflow_names():
        for node in load_api_workflow(name).values():
            for (class_type, widget), folder in MODEL_FOLDERS.items():
                if node["class_type"] == class_type:
                    (models / folder).mkdir(parents=True, exist_ok=True)
                    (models / folder / node["inputs"][widget]).touch()


def picture_of(front_end: FrontEnd, name: str) -> Image.Image:
    """Drop the workflow on the canvas and return its groups' picture, WIDTH wide."""
    page = front_end.page
    front_end.drop_file(WORKFLOWS / f"{name}.json", next(iter(load_api_workflow(name).values()))["class_type"])
    page.wait_for_timeout(3000)
    frame = page.evaluate(FRAME, [LEFT, TOP])
    width, height = frame["width"], frame["height"]
    page.set_viewport_size({"width": int(width) + LEFT + RIGHT, "height": int(height) + TOP + BOTTOM})
    page.wait_for_timeout(4000)
    shot = page.screenshot(clip={"x": LEFT, "y": TOP, "width": width, "height": height})
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    if picture.width > WIDEST * picture.height:
        picture = in_two_rows(picture, frame["boxes"])
    return picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)


def in_two_rows(picture: Image.Image, boxes: list[tuple[float, float, float, float]]) -> Image.Image:
    """Return the left groups above the right ones; `boxes` are the groups' (left, top, width, height)."""
    gaps = [
        (round(left + width + right) // 2, number)
        for number, ((left, _, width, _), (right, *_)) in enumerate(itertools.pairwise(boxes), start=1)
    ]
    cut, number = min(gaps, key=lambda gap: max(gap[0], picture.width - gap[0]))
    upper, lower = (round(max(top + height for _, top, _, height in row)) for row in (boxes[:number], boxes[number:]))
    margin = 16
    rows = Image.new("RGB", (max(cut, picture.width - cut), upper + lower + 2 * margin), picture.getpixel((2, 2)))
    rows.paste(picture.crop((0, 0, cut, upper + margin)), (0, 0))
    rows.paste(picture.crop((cut, 0, picture.width, lower + margin)), (0, upper + margin))
    return rows


def save(picture: Image.Image, path: Path) -> None:
    """Write the JPEG, as good as LARGEST_FILE bytes allow."""
    for quality in range(90, 30, -5):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
        if buffer.tell() <= LARGEST_FILE:
            path.write_bytes(buffer.getvalue())
            return
    raise ValueError(f"{path.name} takes more than {LARGEST_FILE} bytes.")


def main() -> None:
    executable = find_chromium()
    if executable is None:
        sys.exit("thumbnail: no Chromium is installed.")
    with tempfile.TemporaryDirectory() as folder:
        base, models = Path(folder) / "base", Path(folder) / "models"
        write_example_inputs(base / "input")
        make_placeholders(models)
        comfyui = Path(os.environ["COMFYUI_PATH"])
        with ComfyServer(comfyui, base, models, cpu=True, log=Path(folder) / "log.txt") as server:
            for name in sys.argv[1:]:
                with open_front_end(server.url, executable, SETTINGS) as front_end:
                    save(picture_of(front_end, name), WORKFLOWS / f"{name}.jpg")
                print(f"wrote {WORKFLOWS / name}.jpg")


if __name__ == "__main__":
    main()
