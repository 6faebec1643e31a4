"""The live preview of all panels as a browser receives it over the websocket."""

from __future__ import annotations

import asyncio
import io
import struct
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image
from storydiffusion.devtools.drivers.server import ComfyServer
from storydiffusion.devtools.workflows.shipped import load_api_workflow, on_small_model, with_inputs

PREVIEW_IMAGE, WITH_METADATA = 1, 4  # kinds of binary messages, of the host's protocol.py


@pytest.fixture(scope="module")
def workflow(tiny_sd15_file: Path) -> dict[str, Any]:
    """The shipped workflow with three wide panels, on the smallest checkpoint."""
    prompt = on_small_model(load_api_workflow("consistent_story_sdxl"), tiny_sd15_file, size=128, steps=2)
    story = {"story": "[Mina] waits\n[Mina] reads\n[Mina] runs", "characters": "[Mina] a girl"}
    return with_inputs(prompt, {"EmptyLatentImage": {"height": 64, "batch_size": 3}, "StoryPromptSplitter": story})


@pytest.mark.parametrize(
    ("seed", "method", "knows_metadata", "kinds"),
    [
        (41, "latent2rgb", True, [WITH_METADATA] * 2),
        (42, "latent2rgb", False, [PREVIEW_IMAGE] * 2),
        (43, "none", True, []),
    ],
    ids=["new protocol", "old protocol", "previews off"],
)
def test_what_a_browser_receives(
    server: ComfyServer,
    workflow: dict[str, Any],
    seed: int,  # one each: the server remembers pictures, and would not draw them again
    method: str,
    knows_metadata: bool,
    kinds: list[int],
) -> None:
    prompt = with_inputs(workflow, {"KSampler": {"seed": seed}})
    received = asyncio.run(asyncio.wait_for(run_and_watch(server, prompt, method, knows_metadata), timeout=300))
    assert [kind for kind, _ in received] == kinds
    for _, image in received:
        # 128 x 64 pixels are panels of 16 x 8 latents, three in a column.
        assert image.width / image.height == pytest.approx(16 / 24, abs=0.01)


async def run_and_watch(
    server: ComfyServer, prompt: dict[str, Any], method: str, knows_metadata: bool
) -> list[tuple[int, Image.Image]]:
    """Run a prompt with a preview method of its own; its previews, each with the number of its protocol."""
    client = uuid.uuid4().hex
    body = {"prompt": prompt, "client_id": client, "extra_data": {"preview_method": method}}
    messages = []
    async with (
        aiohttp.ClientSession(server.url) as session,
        session.ws_connect("/ws", params={"clientId": client}, max_msg_size=0) as socket,
    ):
        await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": knows_metadata}})
        async with session.post("/prompt", json=body) as response:
            assert response.status == 200, await response.text()
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                messages += previews_in(message.data)
            elif message.type == aiohttp.WSMsgType.TEXT:
                event = message.json()
                assert event["type"] != "execution_error", event
                if event["type"] == "executing" and event["data"]["node"] is None:
                    break
    return messages


def previews_in(data: bytes) -> list[tuple[int, Image.Image]]:
    """Take a binary message apart: its kind, then a number (format, or length of the metadata), then the image."""
    kind, number = struct.unpack(">II", data[:8])
    if kind not in (PREVIEW_IMAGE, WITH_METADATA):
        return []  # text that nodes show
    return [(kind, Image.open(io.BytesIO(data[8 + (number if kind == WITH_METADATA else 0) :])))]
