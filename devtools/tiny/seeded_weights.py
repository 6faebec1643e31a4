"""Random weights that depend on a tensor's name alone: one recipe, the same file on every machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open

RECIPE_KEY = "recipe"
DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def seeded_tensor(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the float32 tensor that `seed` gives the parameter named `key`.

    Weights are N(0, 1 / fan_in), fan_in being the product of all dimensions but the first: activations keep
    their scale through a deep network. The weight of a norm (one-dimensional) is 1, a bias 0.
    """
    if len(shape) <= 1:
        if key.endswith("bias"):
            return torch.zeros(shape)
        if key.endswith("weight"):
            return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randn(shape, generator=generator).div_(math.sqrt(math.prod(shape[1:])))


def seeded_state_dict(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Return one `seeded_tensor` per entry of `shapes`, in `dtype`."""
    return {key: seeded_tensor(key, shape, seed).to(dtype) for key, shape in shapes.items()}


def parameter_shapes(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return the shape of every key in the module's state dict; the module may live on the meta device."""
    return {prefix + key: tuple(value.shape) for key, value in module.state_dict().items()}


def zeros_without_memory(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Return read-only zeros that take no memory, and no disk once `write_safetensors` wrote them."""
    return torch.zeros((), dtype=dtype).expand(shape)


def _takes_no_memory(tensor: torch.Tensor) -> bool:
    return not any(tensor.stride()) and not tensor[(0,) * tensor.ndim]


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file whole or not at all; `zeros_without_memory` become holes.

    The library's own writer has no holes: the tiny SDXL checkpoint would take 1.8 GB instead of 0.5 GB.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(_header(tensors, metadata))
            for tensor in tensors.values():
                if _takes_no_memory(tensor):
                    file.seek(tensor.numel() * tensor.element_size(), os.SEEK_CUR)
                else:
                    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.truncate()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the safetensors header: its length (8 bytes, little endian), then JSON padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def ensure_file(path: Path, recipe: str, make: Callable[[], Mapping[str, torch.Tensor]]) -> bool:
    """Write `make()` to `path` unless the file there was made by the same recipe; tell whether it did so.

    `recipe` is any text that determines the tensors; this module's own source is added to it. Of several processes that
    want the file at once one makes it, and the others wait.
    """
    digest = hashlib.sha256(recipe.encode() + Path(__file__).read_bytes()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if _recipe_of(path) == digest:
            return False
        write_safetensors(path, make(), {RECIPE_KEY: digest})
    return True


def _recipe_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(RECIPE_KEY)
    except Exception:  # whatever is wrong with the file, the answer is to make it again
        return None
