"""The shipped video workflow on a real server: a video comes out, and the models are left as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from storydiffusion.devtools.drivers.read_video import read_video
from storydiffusion.devtools.drivers.server import ComfyServer, PromptError
from storydiffusion.devtools.tiny.checkpoints import ensure_checkpoint
from storydiffusion.devtools.tiny.motion import TINY_SD15_VIDEO, TINY_V2, TINY_V3, ensure_motion_module
from storydiffusion.devtools.workflows.shipped import load_api_workflow, node_of, on_small_model, with_inputs

SIZE = 64
APPLY = "StoryApplyMotionModule"
LOAD = "StoryLoadMotionModule"


@pytest.fixture(scope="module")
def workflow(models: Path) -> dict[str, Any]:
    checkpoint = ensure_checkpoint(TINY_SD15_VIDEO, models / "checkpoints")
    for spec in (TINY_V2, TINY_V3):
        ensure_motion_module(spec, models / "animatediff_models")
    small = on_small_model(load_api_workflow("animatediff_text_to_video_sd15"), checkpoint, size=SIZE, steps=2)
    return with_inputs(small, {LOAD: {"motion_module_name": TINY_V2.file_name}})


def frames(server: ComfyServer, prompt: dict[str, Any], seed: int, **changes: dict[str, Any]) -> np.ndarray:
    """Run the prompt with four frames, saved as pictures; return them (frames, height, width, 3)."""
    prompt = with_inputs(prompt, {"EmptyLatentImage": {"batch_size": 4}, "KSampler": {"seed": seed}, **changes})
    prompt.pop(node_of(prompt, "SaveVideo"))
    prompt["save"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [node_of(prompt, "VAEDecode"), 0], "filename_prefix": "frame"},
    }
    steps: list[int] = []
    outputs = server.run(prompt, on_progress=lambda node, done, total: steps.append(done))
    assert steps, "nothing was sampled: the server answered from its cache"
    return np.stack([np.asarray(Image.open(path)) for path in server.image_paths(outputs, "save")])


def test_workflow_makes_a_video(server: ComfyServer, workflow: dict[str, Any]) -> None:
    save = node_of(workflow, "SaveVideo")
    outputs = server.run(workflow)
    (path,) = server.image_paths(outputs, save)
    assert path.suffix == ".mp4"
    pictures, rate = read_video(path)
    assert rate == 8
    assert pictures.shape == (16, SIZE, SIZE, 3)
    assert all(picture.std() > 0 for picture in pictures)


def test_motion_modules_and_plain_model_take_turns(server: ComfyServer, workflow: dict[str, Any]) -> None:
    """One server, one checkpoint: plain, v2, v3 and back again; each run is what it was without the others."""
    sampler = node_of(workflow, "KSampler")
    plain_model = {"KSampler": {"model": [node_of(workflow, "CheckpointLoaderSimple"), 0]}}
    assert workflow[sampler]["inputs"]["model"] != plain_model["KSampler"]["model"]
    other = {LOAD: {"motion_module_name": TINY_V3.file_name}}

    plain = frames(server, with_inputs(workflow, plain_model), 1)
    second_version = frames(server, workflow, 1)
    third_version = frames(server, with_inputs(workflow, other), 1)
    assert not np.array_equal(plain, second_version)
    assert not np.array_equal(second_version, third_version)
    longer = with_inputs(workflow, {"KSampler": {"steps": 3}})  # new prompts: nothing comes from the cache
    frames(server, longer, 1)
    # Scale 0 is the stock model, sampled after all of them.
    assert np.array_equal(plain, frames(server, with_inputs(workflow, {APPLY: {"scale": 0.0}}), 1))


def test_file_of_another_kind_is_refused_by_name(server: ComfyServer, workflow: dict[str, Any], models: Path) -> None:
    stranger = models / "animatediff_models" / "stranger.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, stranger)
    try:
        with pytest.raises(PromptError, match=r"stranger\.safetensors is a whole checkpoint") as refusal:
            server.run(with_inputs(workflow, {LOAD: {"motion_module_name": stranger.name}}))
    finally:
        stranger.unlink()
    assert refusal.value.errors[0].node_class == LOAD


def test_too_many_frames_are_refused_with_the_way_out(server: ComfyServer, workflow: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"33 frames .* at most 32.*Context Windows"):
        server.run(with_inputs(workflow, {"EmptyLatentImage": {"batch_size": 33}}))
