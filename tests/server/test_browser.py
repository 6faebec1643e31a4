"""The shipped workflow in the real front end, as a person uses it: dropped on the canvas and queued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from storydiffusion.devtools.drivers.browser import FrontEnd, open_front_end
from storydiffusion.devtools.drivers.server import ComfyServer
from storydiffusion.devtools.workflows.shipped import WORKFLOWS, api_workflow_names, load_api_workflow


@pytest.fixture
def front_end(server: ComfyServer, chromium: str) -> Iterator[FrontEnd]:
    with open_front_end(server.url, chromium) as opened:
        yield opened


def test_every_workflow_has_both_formats() -> None:
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == api_workflow_names()


@pytest.mark.parametrize("name", api_workflow_names())
def test_every_model_file_has_a_link(name: str) -> None:
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    values = {node["id"]: node.get("widgets_values") or [] for node in workflow["nodes"]}
    linked = {node["id"]: node["properties"].get("models", []) for node in workflow["nodes"]}
    for node, files in values.items():
        named = [file for file in files if str(file).endswith((".safetensors", ".ckpt"))]
        assert [model["name"] for model in linked[node]] == named
        assert all(model["url"].startswith("https://huggingface.co/") for model in linked[node])
    assert any(linked.values())


def test_missing_models_can_be_downloaded(front_end: FrontEnd) -> None:
    front_end.drop_file(WORKFLOWS / "panel_transition_smp_sd15.json", "StorySMPVideoDecode")
    front_end.page.get_by_text("View details").first.click()
    missing = front_end.page.get_by_text("Missing Models").locator("xpath=ancestor::*[contains(., 'Download all')][1]")
    missing.wait_for()
    text = missing.inner_text()
    folders = {
        "v1-5-pruned-emaonly-fp16.safetensors": "checkpoints",
        "mm_sd_v15_v2.ckpt": "animatediff_models",
        "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": "clip_vision",
        "ip-adapter-plus_sd15.safetensors": "ipadapter",
    }
    for file, folder in folders.items():
        assert f"{file}\n{folder}\nDownload\n" in text


@pytest.mark.parametrize("name", api_workflow_names())
def test_ui_file_becomes_its_api_twin(front_end: FrontEnd, name: str) -> None:
    twin = load_api_workflow(name)
    front_end.drop_file(WORKFLOWS / f"{name}.json", next(iter(twin.values()))["class_type"])
    sent = front_end.api_prompt()
    assert {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in sent.items()} == {
        key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in twin.items()
    }
    assert not front_end.errors


def test_a_workflow_saved_under_earlier_socket_names_keeps_its_links(front_end: FrontEnd, tmp_path: Path) -> None:
    name, saved = "panel_transition_smp_sd15", tmp_path / "saved.json"
    text = (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")
    earlier = text.replace('"STORYDIFFUSION_SMP', '"STORY_SMP').replace('"STORYDIFFUSION_MOTION', '"STORY_MOTION')
    assert earlier != text
    saved.write_text(earlier, encoding="utf-8")
    front_end.drop_file(saved, "StorySMPVideoDecode")
    sent = front_end.api_prompt()
    assert {key: node["inputs"] for key, node in sent.items()} == {
        key: node["inputs"] for key, node in load_api_workflow(name).items()
    }
    assert not front_end.errors


def test_dropped_workflow_queues_and_finishes(front_end: FrontEnd, server: ComfyServer, tiny_sd15_file: Path) -> None:
    front_end.drop_file(WORKFLOWS / "consistent_story_sdxl.json", "StoryPromptSplitter")
    # What a person with this small model and little time would type (SD1.5: its text encoder is the quicker).
    front_end.set_widgets("CheckpointLoaderSimple", {"ckpt_name": tiny_sd15_file.name})
    front_end.set_widgets("EmptyLatentImage", {"width": 128, "height": 128})
    front_end.set_widgets("KSampler", {"steps": 2, "seed": 90})
    entry = server.wait_for(front_end.queue())
    assert entry["status"]["status_str"] == "success", entry["status"]
    panels = entry["outputs"]["8"]["images"]
    assert len(panels) == 4
    assert all((server.base / "output" / image["subfolder"] / image["filename"]).is_file() for image in panels)
    assert not front_end.errors


def test_wrong_input_is_explained_in_the_window(front_end: FrontEnd, server: ComfyServer, tiny_sd15_file: Path) -> None:
    front_end.drop_file(WORKFLOWS / "consistent_story_sdxl.json", "StoryPromptSplitter")
    front_end.set_widgets("CheckpointLoaderSimple", {"ckpt_name": tiny_sd15_file.name})
    front_end.set_widgets("StoryPromptSplitter", {"story": "[Mina] waits\n[Zoe] sings"})
    entry = server.wait_for(front_end.queue())
    assert entry["status"]["status_str"] == "error"
    front_end.page.get_by_text("View details").first.click()
    front_end.page.get_by_text("[Zoe] is not in the characters field").first.wait_for()
