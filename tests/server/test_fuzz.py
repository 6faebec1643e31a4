"""API graphs with values and links of wrong types: the server says what is wrong, and later draws what is right."""

from __future__ import annotations

import copy
import json
import math
import re
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from storydiffusion.devtools.drivers.server import ComfyServer, Prompt, PromptError
from storydiffusion.devtools.workflows.whole_pack import ensure_small_models, whole_pack
from storydiffusion.nodes import NODES
from storydiffusion.tests.helpers.fuzzing import examples

INTERNAL = re.compile(
    r"(Key|Index|Type|Attribute)Error|object has no|not subscriptable|out of range|indices must be|' object"
)


OURS = {node.define_schema().node_id for node in NODES}
PLAIN = {"STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}
KINDS = {
    (node.define_schema().node_id, entry.id): entry.get_io_type()
    for node in NODES
    for entry in node.define_schema().inputs
}


@pytest.fixture(scope="module")
def right(models: Path) -> Prompt:
    ensure_small_models(models)
    prompt = whole_pack()
    assert {node["class_type"] for node in prompt.values()} >= OURS
    return prompt


def pictures(server: ComfyServer, prompt: Prompt) -> dict[str, list[bytes]]:
    """What the prompt saves, computed from its beginning."""
    data = json.dumps({"unload_models": True, "free_memory": True}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(server.url + "/free", data, {"Content-Type": "application/json"})
    ):
        pass
    outputs = server.run(prompt)
    saved = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    return {key: [np.asarray(Image.open(path)).tobytes() for path in server.image_paths(outputs, key)] for key in saved}


@pytest.fixture(scope="module")
def drawn(server: ComfyServer, right: Prompt) -> dict[str, list[bytes]]:
    found = pictures(server, right)
    assert all(found.values())
    return found


values = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 1, 2, 7, 10**20, -(2**63), 0.5, -0.0, 1e300, math.nan, math.inf, "", "x", "1", "0.5"]
    ),
    st.sampled_from(
        [[], {}, ["split"], ["split", 0, 0], {"a": 1}, [None, None], "[Bob]", "\0", "1: 0.5", "[NC] a\n[Mina] b"]
    ),
)


@st.composite
def faults(draw: st.DrawFn) -> tuple[int, int, Any, int, int]:
    """Numbers that choose a node, an input of it, a value, and another node's output."""
    big = st.integers(0, 10**6)
    return draw(big), draw(big), draw(values), draw(big), draw(st.integers(0, 2))


def with_fault(prompt: Prompt, fault: tuple[int, int, Any, int, int]) -> tuple[Prompt, str]:
    """The prompt with one input of one of our nodes changed, and the input's name.

    Left out, since the host lets them through unseen, or has only Python's own words for them: values where a socket
    takes links alone, and links to nodes or outputs that aren't there.
    """
    node_number, input_number, value, source_number, output = fault
    ours = sorted(key for key, node in prompt.items() if node["class_type"] in OURS and node["inputs"])
    changed = copy.deepcopy(prompt)
    node = changed[ours[node_number % len(ours)]]
    name = sorted(node["inputs"])[input_number % len(node["inputs"])]
    sources = ["checkpoint", "picture", "mask", "split", "encoded", "smp", "module", "vision"]
    outputs = {"checkpoint": 3, "split": 5, "encoded": 2}
    source = sources[source_number % len(sources)]
    link = [source, output % outputs.get(source, 1)]
    takes_values = KINDS[node["class_type"], name] in PLAIN
    node["inputs"][name] = value if takes_values and source_number % 4 else link
    return changed, name


def complaints(server: ComfyServer, prompt: Prompt) -> list[str]:
    """What the server has against the prompt; nothing if it runs."""
    try:
        server.run(prompt, timeout=60)
    except PromptError as refusal:
        return [error.message for error in refusal.errors]
    return []


@pytest.mark.slow
@examples(10)
@given(faults())
def test_a_wrong_graph_ends_in_words(
    server: ComfyServer, right: Prompt, drawn: dict[str, list[bytes]], fault: tuple[int, int, Any, int, int]
) -> None:
    wrong, name = with_fault(right, fault)
    said = complaints(server, wrong)
    assert not any(INTERNAL.search(message) for message in said), said
    assert not said or any(name in message.lower() for message in said), said


@pytest.mark.slow
def test_the_right_graph_is_drawn_as_before(server: ComfyServer, right: Prompt, drawn: dict[str, list[bytes]]) -> None:
    assert pictures(server, right) == drawn
