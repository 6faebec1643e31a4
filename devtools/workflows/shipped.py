"""Shipped workflows, and the changes that let them run on a small model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ..drivers.server import PACK_ROOT, Prompt
from ..toy.animation import FRAMES
from ..toy.video_files import MOTION_WEIGHTS, SMP_WEIGHTS

WORKFLOWS = PACK_ROOT / "workflows"
TOY_SIZE = 256
# The toy world's loaders, by the stock loader that each stands in for; outputs come in the same order.
TOY_LOADERS = {"CheckpointLoaderSimple": "StoryToyLoader", "CLIPVisionLoader": "StoryToyCLIPVision"}


def load_api_workflow(name: str) -> Prompt:
    """Return the API-format twin of a shipped workflow."""
    prompt: Prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    return prompt


def api_workflow_names() -> list[str]:
    return sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def node_of(prompt: Prompt, class_type: str) -> str:
    """Return the id of the only node of this class."""
    (node_id,) = [key for key, node in prompt.items() if node["class_type"] == class_type]
    return node_id


def node_saving(prompt: Prompt, class_type: str) -> str:
    """Return the id of the SaveImage node that saves the images of the only node of this class."""
    source = node_of(prompt, class_type)
    saving = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    (node_id,) = [key for key in saving if prompt[key]["inputs"]["images"][0] == source]
    return node_id


def with_inputs(prompt: Prompt, changes: dict[str, dict[str, Any]]) -> Prompt:
    """Return a copy in which every node of a class in `changes` has these inputs instead.

    Raises:
        KeyError: no node of the class has such an input, so the change would be without effect.
    """
    changed = copy.deepcopy(prompt)
    for class_type, inputs in changes.items():
        nodes = [node for node in changed.values() if node["class_type"] == class_type]
        for name, value in inputs.items():
            if not any(name in node["inputs"] for node in nodes):
                raise KeyError(f"{class_type}.{name}")
            for node in nodes:
                node["inputs"][name] = value
    return changed


def on_toy_world(prompt: Prompt, *, story: str, characters: str) -> Prompt:
    """Return the workflow with the toy world's loader and picture size, and a story in the words that it knows."""
    changed = with_inputs(
        prompt,
        {
            "EmptyLatentImage": {"width": TOY_SIZE, "height": TOY_SIZE},
            "StoryPromptSplitter": {"story": story, "characters": characters, "style": "none", "negative": ""},
        },
    )
    return with_toy_loaders(changed)


def on_toy_video(prompt: Prompt, *, steps: int, cfg: float) -> Prompt:
    """Return a video workflow on the toy world's models: clips of 8 frames, as they were trained.

    The motion module was trained on the model's own noise schedule, and soft neighbours would hold six of eight frames
    for a part of sampling.
    """
    toy: dict[str, dict[str, Any]] = {
        "StoryLoadMotionModule": {"motion_module_name": MOTION_WEIGHTS.name},
        "StoryApplyMotionModule": {"beta_schedule": "from the model"},
        "StoryLoadSMP": {"smp": SMP_WEIGHTS.name, "ip_adapter": "none"},
        "ImageScale": {"width": TOY_SIZE, "height": TOY_SIZE},
        "StorySemanticMotionPredictor": {"frames": FRAMES},
        "StorySMPVideoDecode": {"steps": steps, "cfg": cfg, "anchor": "hold"},
    }
    used = {node["class_type"] for node in prompt.values()}
    return with_toy_loaders(with_inputs(prompt, {name: inputs for name, inputs in toy.items() if name in used}))


def with_toy_loaders(prompt: Prompt) -> Prompt:
    """Return the workflow with the toy world's loaders in place of the stock ones."""
    changed = dict(prompt)
    for key, node in prompt.items():
        if node["class_type"] in TOY_LOADERS:
            changed[key] = {"class_type": TOY_LOADERS[node["class_type"]], "inputs": {}}
    return changed


def on_small_model(prompt: Prompt, checkpoint: Path, *, size: int, steps: int) -> Prompt:
    """Return the workflow on another checkpoint, smaller and shorter; nothing else is changed."""
    return with_inputs(
        prompt,
        {
            "CheckpointLoaderSimple": {"ckpt_name": checkpoint.name},
            "EmptyLatentImage": {"width": size, "height": size},
            "KSampler": {"steps": steps},
        },
    )
