"""What headless users rely on: ids, inputs and outputs of the nodes are as the committed snapshot says.

A change that is meant: `python dev.py test tests/server --update-contracts`, and a line in CHANGELOG.md.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import comfy.samplers
import pytest
from storydiffusion.devtools.drivers.server import ComfyServer
from storydiffusion.nodes import NODES

SNAPSHOT = Path(__file__).with_name("object_info.json")
MODEL_FILES = (".safetensors", ".ckpt", ".pt", ".pt2", ".bin", ".pth", ".pkl", ".sft")
HOST_LISTS = {"sampler_name": comfy.samplers.KSampler.SAMPLERS, "scheduler": comfy.samplers.KSampler.SCHEDULERS}


def as_text(info: dict[str, Any]) -> str:
    return json.dumps(info, indent=1, ensure_ascii=False) + "\n"


def without_this_machine(info: dict[str, Any]) -> dict[str, Any]:
    """`info` without the model files that lie here, and without the host's own lists."""
    for inputs in (group for node in info.values() for group in node["input"].values()):
        for name, (kind, *details) in inputs.items():
            if kind == "COMBO":
                options = details[0]["options"]
                if name in HOST_LISTS:
                    assert options == HOST_LISTS[name]
                    details[0]["options"] = "the host's"
                else:
                    details[0]["options"] = [option for option in options if not str(option).endswith(MODEL_FILES)]
    return info


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/object_info") as response:
        everything = json.load(response)
    return {node.define_schema().node_id: everything[node.define_schema().node_id] for node in NODES}


def test_object_info_is_the_snapshots(object_info: dict[str, Any], request: pytest.FixtureRequest) -> None:
    found = as_text(without_this_machine(object_info))
    if request.config.getoption("--update-contracts"):
        SNAPSHOT.write_text(found, encoding="utf-8")
    assert json.loads(found) == json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert found == SNAPSHOT.read_text(encoding="utf-8")  # the order of inputs is that of widgets in saved workflows


def test_no_node_of_the_pack_is_missing_from_the_snapshot() -> None:
    known = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert list(known) == [node.define_schema().node_id for node in NODES]
