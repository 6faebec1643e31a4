"""Write the toy world's weights as they are shipped: half precision, with where they come from beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch


def write_weights(
    state: dict[str, torch.Tensor], path: Path, record: dict[str, str], metadata: dict[str, str] | None = None
) -> None:
    """Save `state` as fp16 safetensors, and `record` with the file's sha256 in a JSON beside it.

    The file's own metadata are `metadata`, or else the record as well.
    """
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in state.items()}
    content = safetensors.torch.save(halves, metadata=record if metadata is None else metadata)
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)
    beside = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), **record}
    path.with_suffix(".json").write_text(json.dumps(beside, indent=2) + "\n")
