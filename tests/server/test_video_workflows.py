"""The shipped story-to-video workflows on a real server, and those that small models can run in the real front end."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from storydiffusion.benchmarks.transitions.drawing import what_stays
from storydiffusion.benchmarks.transitions.metrics import find_figure
from storydiffusion.devtools.drivers.browser import FrontEnd, open_front_end
from storydiffusion.devtools.drivers.read_video import read_video
from storydiffusion.devtools.drivers.server import ComfyServer, Prompt, PromptError
from storydiffusion.devtools.tiny.checkpoints import ensure_checkpoint
from storydiffusion.devtools.tiny.motion import TINY_SD15_VIDEO, TINY_V2, ensure_motion_module
from storydiffusion.devtools.tiny.smp import TINY_BASE, ensure_ip_adapter
from storydiffusion.devtools.toy.animation import FRAMES as TOY_FRAMES
from storydiffusion.devtools.toy.animation import STEP, film, times
from storydiffusion.devtools.toy.clips import take
from storydiffusion.devtools.toy.video_files import install_video_files
from storydiffusion.devtools.workflows.shipped import WORKFLOWS, load_api_workflow, node_of, on_toy_video, with_inputs

SIZE = 64
FRAMES = 3
STEPS = 1
STORY = "[Mina] finds a letter\n[Mina] sails\n[NC] an island"
DECODE = "StorySMPVideoDecode"
PANEL_INPUTS = {
    "StoryPromptSplitter": {"story": STORY},
    "EmptyLatentImage": {"width": SIZE, "height": SIZE},
    "KSampler": {"steps": STEPS},
}

# What a person does who has another loader: put it in the place of the old one.
REPLACE_NODE = """([oldType, newType]) => {
    const old = app.graph.nodes.find((node) => node.type === oldType);
    const stand_in = LiteGraph.createNode(newType);
    app.graph.add(stand_in);
    for (const id of [...old.outputs[0].links]) {
        const link = app.graph.links.get(id);
        stand_in.connect(0, app.graph.getNodeById(link.target_id), link.target_slot);
    }
    app.graph.remove(old);
}"""


@pytest.fixture(scope="module")
def small_models(models: Path) -> dict[str, dict[str, Any]]:
    """Changes that put small SD1.5 parts into a workflow's loaders; the files are there."""
    checkpoint = ensure_checkpoint(TINY_SD15_VIDEO, models / "checkpoints")
    ensure_motion_module(TINY_V2, models / "animatediff_models")
    ensure_ip_adapter(TINY_BASE, models / "ipadapter")
    return {
        "CheckpointLoaderSimple": {"ckpt_name": checkpoint.name},
        "StoryLoadMotionModule": {"motion_module_name": TINY_V2.file_name},
        "StoryLoadSMP": {"ip_adapter": TINY_BASE.file_name},
        "ImageScale": {"width": SIZE, "height": SIZE},
        "StorySemanticMotionPredictor": {"frames": FRAMES},
        DECODE: {"steps": STEPS},
    }


@pytest.fixture(scope="module")
def video_server(
    models: Path, small_models: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A server that has three pictures besides the pack."""
    folder = tmp_path_factory.mktemp("video_server")
    base = folder / "base"
    (base / "input").mkdir(parents=True)
    for name, value in (("start", 40), ("end", 200), ("third", 120)):
        pixels = np.full((SIZE, SIZE, 3), value, np.uint8)
        pixels[:, : SIZE // 2, 0] = 255 - value
        Image.fromarray(pixels).save(base / "input" / f"{name}.png")
    with ComfyServer(Path(os.environ["COMFYUI_PATH"]), base, models, cpu=True, log=folder / "log.txt") as running:
        yield running


def small(name: str, changes: dict[str, dict[str, Any]]) -> Prompt:
    """Return the shipped workflow on small models, with a stand-in for the image encoder."""
    prompt = with_inputs(load_api_workflow(name), changes)
    prompt[node_of(prompt, "CLIPVisionLoader")] = {"class_type": "StoryTinyCLIPVision", "inputs": {}}
    return prompt


def saved_video(server: ComfyServer, outputs: dict[str, Any], prompt: Prompt) -> tuple[np.ndarray, float]:
    (path,) = server.image_paths(outputs, node_of(prompt, "SaveVideo"))
    assert path.suffix == ".mp4"
    return read_video(path)


def test_nodes_have_help(video_server: ComfyServer) -> None:
    for node_id in (DECODE, "StoryPanelPairs", "StoryJoinClips"):
        address = f"{video_server.url}/extensions/ComfyUI-StoryDiffusion/docs/{node_id}.md"
        with urllib.request.urlopen(address) as page:
            assert len(page.read()) > 200


def test_two_pictures_become_a_transition(video_server: ComfyServer, small_models: dict[str, dict[str, Any]]) -> None:
    prompt = small("panel_transition_smp_sd15", small_models)
    progress: list[tuple[str, int, int]] = []
    outputs = video_server.run(prompt, on_progress=lambda *step: progress.append(step))
    assert (DECODE, STEPS, STEPS) in progress
    pictures, rate = saved_video(video_server, outputs, prompt)
    assert pictures.shape == (FRAMES, SIZE, SIZE, 3)
    assert rate == prompt[node_of(prompt, DECODE)]["inputs"]["fps"]
    with pytest.raises(AssertionError):  # the two panels, held, are not one picture
        np.testing.assert_allclose(pictures[0], pictures[-1], atol=20)


def test_a_story_becomes_one_video(
    video_server: ComfyServer, small_models: dict[str, dict[str, Any]], tiny_sdxl_file: Path
) -> None:
    prompt = small("story_to_video", {**small_models, **PANEL_INPUTS})
    sdxl, _ = [key for key, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple"]
    prompt[sdxl]["inputs"]["ckpt_name"] = tiny_sdxl_file.name
    progress: list[tuple[str, int, int]] = []
    outputs = video_server.run(prompt, on_progress=lambda *step: progress.append(step))
    assert [step for step in progress if step[0] == DECODE][-1] == (DECODE, 2 * STEPS, 2 * STEPS)
    pictures, _ = saved_video(video_server, outputs, prompt)
    assert pictures.shape == (2 * FRAMES - 1, SIZE, SIZE, 3)
    assert len(video_server.image_paths(outputs, node_of(prompt, "SaveImage"))) == 3


def test_trained_smp_runs_in_the_shipped_workflow(models: Path, video_server: ComfyServer) -> None:
    """The toy world's files through the pack's loaders: the figure crosses the picture in its own clothes."""
    install_video_files(models)
    shots = (take("held out", number, seed=9).shot for number in range(99))
    shot = next(each for each in shots if abs(each.end.x - each.start.x) > 2 * STEP)
    true = film(shot, TOY_FRAMES)
    for name, picture in (("toy_start", true[0]), ("toy_end", true[-1])):
        pixels = (picture * 255).round().astype(np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(video_server.base / "input" / f"{name}.png")
    prompt = on_toy_video(load_api_workflow("panel_transition_smp_sd15"), steps=10, cfg=3.0)
    for node in prompt.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = f"toy_{node['inputs']['image']}"
    prompt = with_inputs(prompt, {"CLIPTextEncode": {"text": ""}})
    prompt[prompt[node_of(prompt, DECODE)]["inputs"]["positive"][0]]["inputs"]["text"] = what_stays(shot)
    pictures, _ = saved_video(video_server, video_server.run(prompt), prompt)
    drawn = pictures[:, 4::8, 4::8] / 255
    assert drawn.shape == true.shape
    assert np.abs(drawn[[0, -1]] - true[[0, -1]]).mean() < 0.02  # held, but for the video's compression
    found = [find_figure(frame, shot, time) for frame, time in zip(drawn, times(TOY_FRAMES), strict=True)][1:-1]
    frozen = [find_figure(true[0], shot, time) for time in times(TOY_FRAMES)][1:-1]
    assert np.mean([off for off, _ in found]) < 0.5 * np.mean([off for off, _ in frozen])
    assert np.mean([right for _, right in found]) > 0.5  # by chance one in four to one in eight


def test_what_follows_panel_pairs_runs_once_for_each(video_server: ComfyServer) -> None:
    """Three pictures, two pairs, each made a clip of two frames by core: joined, the three pictures again."""
    names = ("start", "end", "third")
    prompt: Prompt = {name: {"class_type": "LoadImage", "inputs": {"image": f"{name}.png"}} for name in names}
    prompt["batch"] = {
        "class_type": "BatchImagesNode",
        "inputs": {f"images.image{number}": [name, 0] for number, name in enumerate(names)},
    }
    prompt["pairs"] = {
        "class_type": "StoryPanelPairs",
        "inputs": {"images": ["batch", 0], "video_model": "LTX (32k, 8n+1)", "frames": 9},
    }
    prompt["clip"] = {
        "class_type": "BatchImagesNode",
        "inputs": {"images.image0": ["pairs", 0], "images.image1": ["pairs", 1]},
    }
    prompt["join"] = {"class_type": "StoryJoinClips", "inputs": {"clips": ["clip", 0]}}
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": ["join", 0], "filename_prefix": "joined"}}
    saved = video_server.image_paths(video_server.run(prompt), "save")
    originals = [video_server.base / "input" / f"{name}.png" for name in names]
    assert len(saved) == 3
    for path, original in zip(saved, originals, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(original)))


def refusals(server: ComfyServer, prompt: Prompt) -> list[str]:
    """Return what the host's own validation says against the prompt, without its saved panels: it never starts."""
    kept = {key: node for key, node in prompt.items() if node["class_type"] != "SaveImage"}
    with pytest.raises(PromptError) as refusal:
        server.run(kept)
    return sorted(f"{error.node_class}: {error.message.split(':')[0]}" for error in refusal.value.errors)


def test_wan_workflow_lacks_nothing_but_its_model_files(video_server: ComfyServer, tiny_sdxl_file: Path) -> None:
    prompt = load_api_workflow("story_to_wan_flf2v")
    prompt = with_inputs(prompt, {"CheckpointLoaderSimple": {"ckpt_name": tiny_sdxl_file.name}})
    missing = [f"{loader}: Value not in list" for loader in ("CLIPLoader", "UNETLoader", "UNETLoader", "VAELoader")]
    assert refusals(video_server, prompt) == missing
    # The host does look at every node: a wrong number at the far end is one more refusal.
    wrong = with_inputs(prompt, {"WanFirstLastFrameToVideo": {"batch_size": 0}})
    assert refusals(video_server, wrong) == [*missing, "WanFirstLastFrameToVideo: Value 0 smaller than min of 1"]


@pytest.fixture
def front_end(video_server: ComfyServer, chromium: str) -> Iterator[FrontEnd]:
    with open_front_end(video_server.url, chromium) as opened:
        yield opened


def drop_on_small_models(front_end: FrontEnd, name: str, changes: dict[str, dict[str, Any]], seed: int) -> None:
    """Drop the shipped workflow, and do to it what `small` does, by hand."""
    front_end.drop_file(WORKFLOWS / f"{name}.json", DECODE)
    front_end.page.evaluate(REPLACE_NODE, ["CLIPVisionLoader", "StoryTinyCLIPVision"])
    for node_type, values in changes.items():
        front_end.set_widgets(node_type, values)
    front_end.set_widgets(DECODE, {"seed": seed})


def queued_video(server: ComfyServer, front_end: FrontEnd) -> np.ndarray:
    """Press the queue button; return the pictures of the video that was saved, when the server is done."""
    entry = server.wait_for(front_end.queue())
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert not front_end.errors
    (video,) = [output["images"] for output in entry["outputs"].values() if output.get("animated")]
    pictures, _ = read_video(server.base / "output" / video[0]["subfolder"] / video[0]["filename"])
    return pictures


def test_dropped_transition_queues_and_finishes(
    video_server: ComfyServer, front_end: FrontEnd, small_models: dict[str, dict[str, Any]]
) -> None:
    drop_on_small_models(front_end, "panel_transition_smp_sd15", small_models, seed=90)
    assert len(queued_video(video_server, front_end)) == FRAMES


def test_dropped_story_queues_and_becomes_one_video(
    video_server: ComfyServer, front_end: FrontEnd, small_models: dict[str, dict[str, Any]]
) -> None:
    """Both checkpoints are the SD1.5 here (the panels' too: its text encoder is the quicker)."""
    drop_on_small_models(front_end, "story_to_video", {**small_models, **PANEL_INPUTS}, seed=91)
    assert len(queued_video(video_server, front_end)) == 2 * FRAMES - 1
