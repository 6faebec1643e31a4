"""The shipped workflows with pictures of one's own, on a real server: references, an earlier chapter, poses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from storydiffusion.devtools.drivers.server import ComfyServer, Prompt, PromptError
from storydiffusion.devtools.tiny.controlnet import TINY_SDXL_CONTROL, ensure_controlnet
from storydiffusion.devtools.workflows.example_inputs import write_example_inputs
from storydiffusion.devtools.workflows.shipped import load_api_workflow, node_saving, on_small_model, with_inputs

SIZE = 64
SHARING = "StoryApplyConsistentSelfAttention"


@pytest.fixture(scope="module")
def story_server(server: ComfyServer) -> ComfyServer:
    """The server, with the pictures that the workflows name, and each with its colours inverted."""
    folder = server.base / "input"
    write_example_inputs(folder)
    for path in list(folder.glob("*.png")):
        ImageOps.invert(Image.open(path).convert("RGB")).save(path.with_name(f"inverted_{path.name}"))
    return server


def small(name: str, checkpoint: Path) -> Prompt:
    return on_small_model(load_api_workflow(name), checkpoint, size=SIZE, steps=2)


def draw(server: ComfyServer, prompt: Prompt, panels_from: str) -> np.ndarray:
    """Run the prompt; return its panels (panels, height, width, 3) once the page is found to hold them too."""
    outputs = server.run(prompt)
    panels = [np.asarray(Image.open(path)) for path in server.image_paths(outputs, node_saving(prompt, panels_from))]
    (page,) = server.image_paths(outputs, node_saving(prompt, "StoryContactSheet"))
    assert np.asarray(Image.open(page)).shape[0] > SIZE
    return np.stack(panels).astype(int)


def with_inverted(prompt: Prompt, picture: str) -> Prompt:
    """Return the prompt with another picture loaded in the place of this one."""
    changed = with_inputs(prompt, {})
    (loader,) = [node for node in changed.values() if node["inputs"].get("image") == picture]
    loader["inputs"]["image"] = f"inverted_{picture}"
    return changed


def changed_panels(first: np.ndarray, second: np.ndarray) -> Sequence[int]:
    """Numbers of the panels in which a colour differs by more than rounding."""
    assert first.shape == second.shape
    return np.flatnonzero(abs(first - second).max((1, 2, 3)) > 2).tolist()


def test_panels_are_drawn_after_my_character(story_server: ComfyServer, tiny_sdxl_file: Path) -> None:
    prompt = with_inputs(
        small("reference_character_sdxl", tiny_sdxl_file), {"ImageScale": {"width": SIZE, "height": SIZE}}
    )
    panels = draw(story_server, prompt, "ImageFromBatch")
    assert panels.shape == (4, SIZE, SIZE, 3)
    other = draw(story_server, with_inverted(prompt, "character.png"), "ImageFromBatch")
    assert changed_panels(panels, other) == [0, 1, 2]  # nobody stands in the last one
    alone = draw(story_server, with_inputs(prompt, {SHARING: {"sampling_rate": 0.0}}), "ImageFromBatch")
    assert changed_panels(panels, alone) == [0, 1, 2]


def test_a_chapter_continues_the_earlier_one_in_windows(story_server: ComfyServer, tiny_sd15_file: Path) -> None:
    prompt = with_inputs(small("continue_story_sdxl", tiny_sd15_file), {"ImageScale": {"width": SIZE, "height": SIZE}})
    panels = draw(story_server, prompt, "ImageFromBatch")
    assert panels.shape == (8, SIZE, SIZE, 3)
    assert "Context window 2/2" in story_server.log_text()
    # Without sharing all panels are others, the last ones too, but not the one in which nobody stands.
    alone = draw(story_server, with_inputs(prompt, {SHARING: {"sampling_rate": 0.0}}), "ImageFromBatch")
    assert changed_panels(panels, alone) == [0, 1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def poses(tiny_sdxl_file: Path, models: Path) -> Prompt:
    control = ensure_controlnet(TINY_SDXL_CONTROL, models / "controlnet")
    prompt = small("consistent_story_controlnet_sdxl", tiny_sdxl_file)
    return with_inputs(prompt, {"ControlNetLoader": {"control_net_name": control.name}})


def test_each_panel_follows_its_pose(story_server: ComfyServer, poses: Prompt) -> None:
    panels = draw(story_server, poses, "VAEDecode")
    assert panels.shape == (4, SIZE, SIZE, 3)
    assert 2 in changed_panels(panels, draw(story_server, with_inverted(poses, "pose_3.png"), "VAEDecode"))
    # With sharing others may see the pose in the panel that has it; without, nobody does.
    alone = with_inputs(poses, {SHARING: {"sampling_rate": 0.0}})
    panels = draw(story_server, alone, "VAEDecode")
    assert changed_panels(panels, draw(story_server, with_inverted(alone, "pose_3.png"), "VAEDecode")) == [2]


def test_a_missing_pose_is_refused(story_server: ComfyServer, poses: Prompt) -> None:
    """In windows; the host alone would begin again with the first pose."""
    prompt = with_inputs(poses, {SHARING: {"window": 2}})
    (batch,) = [node for node in prompt.values() if node["class_type"] == "BatchImagesNode"]
    del batch["inputs"]["images.image3"]
    with pytest.raises(PromptError, match="has 3 hint images, but the latent batch has 4 panels"):
        story_server.run(prompt)
