"""The shipped workflow on a real server, as a headless user runs it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from storydiffusion.devtools.drivers.server import ComfyServer, PromptError, ServerError, check_port
from storydiffusion.devtools.workflows.shipped import load_api_workflow, node_saving, on_small_model, with_inputs

SIZE = 128
PANELS = 4
SHARING = "StoryApplyConsistentSelfAttention"


@pytest.fixture(scope="module")
def workflow(tiny_sdxl_file: Path) -> dict[str, Any]:
    return on_small_model(load_api_workflow("consistent_story_sdxl"), tiny_sdxl_file, size=SIZE, steps=2)


def get(server: ComfyServer, path: str) -> Any:
    with urllib.request.urlopen(server.url + path) as response:
        return json.load(response)


def forget_results(server: ComfyServer) -> None:
    """Empty the server's caches, so that the next prompt computes everything."""
    data = json.dumps({"unload_models": True, "free_memory": True}).encode()
    request = urllib.request.Request(server.url + "/free", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request):
        pass


def draw(server: ComfyServer, prompt: dict[str, Any]) -> np.ndarray:
    """Run the prompt and return its panels (panels, height, width, 3); the sampler must really have run."""
    steps: list[int] = []
    outputs = server.run(prompt, on_progress=lambda node, done, total: steps.append(done))
    assert steps, "nothing was sampled: the server answered from its cache"
    paths = server.image_paths(outputs, node_saving(prompt, "VAEDecode"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def seeded(prompt: dict[str, Any], seed: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the prompt with a sampler seed of the test's own: the server remembers other tests' pictures."""
    return with_inputs(prompt, {"KSampler": {"seed": seed}, **(changes or {})})


def test_nodes_are_registered_with_help(server: ComfyServer) -> None:
    ids = ["StoryPromptSplitter", "StoryEncodePrompts", SHARING, "StoryContactSheet"]
    known = get(server, "/object_info")
    for node_id in ids:
        assert known[node_id]["category"].startswith("StoryDiffusion")
        with urllib.request.urlopen(f"{server.url}/extensions/ComfyUI-StoryDiffusion/docs/{node_id}.md") as page:
            assert len(page.read()) > 200


def test_workflow_draws_panels_and_a_page(server: ComfyServer, workflow: dict[str, Any]) -> None:
    progress: list[tuple[str, int, int]] = []
    outputs = server.run(seeded(workflow, 1), on_progress=lambda *step: progress.append(step))
    assert ("KSampler", 2, 2) in progress
    images = [server.image_paths(outputs, node_id) for node_id in ("8", "10")]
    assert [len(paths) for paths in images] == [PANELS, 1]
    panels = [np.asarray(Image.open(path)) for path in images[0]]
    assert {panel.shape for panel in panels} == {(SIZE, SIZE, 3)}
    assert all(panel.std() > 0 for panel in panels)
    assert len({panel.tobytes() for panel in panels}) == PANELS
    page = np.asarray(Image.open(images[1][0]))
    assert page.shape[0] > 2 * SIZE
    assert page.shape[1] >= 2 * SIZE


def test_same_seed_same_pictures_whatever_ran_before(
    server: ComfyServer, workflow: dict[str, Any], tiny_sd15_file: Path
) -> None:
    first = draw(server, seeded(workflow, 2))
    # The model with its patches comes from the server's cache here, the pictures do not.
    longer = draw(server, with_inputs(workflow, {"KSampler": {"seed": 2, "steps": 3}}))
    assert not np.array_equal(first, longer)
    draw(server, with_inputs(workflow, {"CheckpointLoaderSimple": {"ckpt_name": tiny_sd15_file.name}}))
    forget_results(server)
    assert np.array_equal(first, draw(server, seeded(workflow, 2)))


def test_another_sharing_seed_gives_other_pictures(server: ComfyServer, workflow: dict[str, Any]) -> None:
    first = draw(server, seeded(workflow, 3))
    assert not np.array_equal(first, draw(server, seeded(workflow, 3, {SHARING: {"seed": 1}})))


def test_rate_zero_is_the_stock_model(server: ComfyServer, workflow: dict[str, Any]) -> None:
    stock = draw(server, with_inputs(workflow, {"KSampler": {"seed": 4, "model": ["1", 0]}}))
    assert np.array_equal(stock, draw(server, seeded(workflow, 4, {SHARING: {"sampling_rate": 0.0}})))
    assert not np.array_equal(stock, draw(server, seeded(workflow, 4)))


@pytest.mark.parametrize(
    ("changes", "node", "words"),
    [
        ({"EmptyLatentImage": {"batch_size": 3}}, "KSampler", ["3", "4", "panel_count"]),
        ({"StoryPromptSplitter": {"story": " \n"}}, "StoryPromptSplitter", ["story is empty"]),
        (
            {"StoryPromptSplitter": {"story": "[Mina] waits\n[Zoe] sings"}},
            "StoryPromptSplitter",
            ["line 2", "[Zoe]", "[Mina]"],
        ),
        ({SHARING: {"sampling_rate": 1.5}}, SHARING, ["sampling_rate", "1.5", "1.0"]),
        (
            {SHARING: {"start_percent": 0.6, "end_percent": 0.4}},
            SHARING,
            ["start_percent", "0.6", "end_percent", "0.4"],
        ),
        ({SHARING: {"blocks": "encoder"}}, SHARING, ["blocks", "encoder", "decoder"]),
    ],
    ids=["batch size", "empty story", "unknown character", "rate", "range", "blocks"],
)
def test_wrong_input_is_refused_by_name_and_value(
    server: ComfyServer, workflow: dict[str, Any], changes: dict[str, Any], node: str, words: list[str]
) -> None:
    with pytest.raises(PromptError) as refusal:
        server.run(with_inputs(workflow, changes))
    errors = [error for error in refusal.value.errors if error.node_class == node]
    assert errors, str(refusal.value)
    for word in words:
        assert word in str(errors[0])


def test_a_diffusion_transformer_is_refused(server: ComfyServer, workflow: dict[str, Any], tiny_dit_file: Path) -> None:
    prompt = with_inputs(workflow, {SHARING: {"model": ["20", 0]}})
    prompt["20"] = {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": tiny_dit_file.name, "weight_dtype": "default"},
    }
    with pytest.raises(PromptError, match="SD3") as refusal:
        server.run(prompt)
    assert refusal.value.errors[0].node_class == SHARING
    assert "SDXL" in str(refusal.value)


def test_server_answers_after_errors(server: ComfyServer, workflow: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"VAEDecode.*Required input is missing: samples"):
        server.run({**workflow, "7": {"class_type": "VAEDecode", "inputs": {"vae": ["1", 2]}}})
    draw(server, seeded(workflow, 5))


def test_taken_port_is_named(server: ComfyServer) -> None:
    with pytest.raises(ServerError, match=f"Port {server.port} is in use"):
        check_port(server.port)


def test_a_server_that_dies_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("raise SystemExit('no such device')\n")
    broken = ComfyServer(tmp_path, tmp_path / "base", tmp_path, cpu=True, log=tmp_path / "log.txt")
    with pytest.raises(ServerError, match=r"status 1.*\n.*\n.*no such device"), broken:
        pass
