"""SMP checkpoints: one safetensors file with predictor, added projections and their config.

Tensors: `motion.predictor.*`, `motion.resampler.*`, `motion.projection.*` and
    `added_kv.blocks.{i}.to_{k,v}.weight`.
Metadata: `format` = "storydiffusion-smp", `format_version`, and `config`, the `SMPModelConfig` as JSON.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import atomic_write
from .config import CrossAttentionSite, ProjectionConfig, ResamplerConfig, SMPConfig, SMPModelConfig
from .injection import AddedKV
from .model import SemanticMotion, SMPWeights

FORMAT = "storydiffusion-smp"
FORMAT_VERSION = 1
LARGEST_SIZE = 2**20
"""Of any number in a config. None comes near it, and products of three such numbers still have a size in bytes."""

_PLAIN_TYPES: dict[str, tuple[type, str]] = {
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
}
_PARTS = {"predictor": SMPConfig, "resampler": ResamplerConfig, "projection": ProjectionConfig}


def save_checkpoint(path: Path, motion: SemanticMotion, added_kv: AddedKV) -> None:
    """Write an SMP to `path`, whole or not at all: the file appears under its name once it is complete.

    Raises:
        ValueError: the SMP has no predictor, or its parts do not fit each other.
    """
    if motion.config.predictor is None:
        raise ValueError("Only an SMP with a predictor is saved; interpolation has nothing trained to keep.")
    if added_kv.sites != motion.config.sites:
        raise ValueError("The added projections are for other cross-attention sites than the config names.")
    weights = SMPWeights(motion.config, motion.state_dict(), added_kv.state_dict())
    tensors = {f"motion.{name}": tensor.contiguous() for name, tensor in weights.motion.items()}
    tensors |= {f"added_kv.{name}": tensor.contiguous() for name, tensor in weights.added_kv.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(motion.config.to_dict(), sort_keys=True),
    }
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def load_checkpoint(path: Path) -> SMPWeights:
    """Read an SMP checkpoint.

    Raises:
        ValueError: not safetensors, another kind of file, a newer format, or weights that do not fit the
            config; the message names the file and says which.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = _read_config(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        _require_layers(config, len(tensors))
        return SMPWeights(config, **_split(tensors))
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a readable safetensors file: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be used as an SMP checkpoint. {error}") from error


def _read_config(metadata: dict[str, str]) -> SMPModelConfig:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"Its metadata does not say format {FORMAT!r}, so it is some other kind of file.")
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise ValueError(f"Its format version is {version!r}; this pack reads version {FORMAT_VERSION}.")
    try:
        data = json.loads(metadata["config"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"Its metadata has no readable config: {error!r}.") from error
    _require_types(SMPModelConfig, data)
    config = SMPModelConfig.from_dict(data)
    if config.predictor is None:
        raise ValueError("Its config has no predictor.")
    return config


def _require_types(owner: type, data: Any) -> None:
    """Raise ValueError, naming the entry, for one of `data` that has no value of the kind that `owner` declares."""
    if not isinstance(data, dict):
        raise ValueError(f"Its config has {_shown(data)} where the entries of {owner.__name__} should be.")
    for field in fields(owner):
        if str(field.type) not in _PLAIN_TYPES or field.name not in data:
            continue
        kind, in_words = _PLAIN_TYPES[str(field.type)]
        value = data[field.name]
        what = f"{owner.__name__}.{field.name}"
        if type(data[field.name]) is not kind:  # a bool is an int to isinstance
            raise ValueError(f"Its config says {what} is {_shown(value)}; it must be {in_words}.")
        least = 0 if field.name in ("number", "index") else 1
        if kind is int and not least <= value <= LARGEST_SIZE:
            raise ValueError(
                f"Its config says {what} is {_shown(value)}; it must lie between {least} and {LARGEST_SIZE}."
            )
    if owner is SMPModelConfig:
        _require_types_of_parts(data)


def _require_types_of_parts(data: dict[str, Any]) -> None:
    for name, part in _PARTS.items():
        if data.get(name) is not None:
            _require_types(part, data[name])
    sites = data.get("sites", [])
    if not isinstance(sites, list):
        raise ValueError(f"Its config has {_shown(sites)} where the list of sites should be.")
    for site in sites:
        _require_types(CrossAttentionSite, site)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _require_layers(config: SMPModelConfig, tensors: int) -> None:
    """ValueError for more layers than a file of that many tensors can have: they would be built before it shows."""
    depth = config.resampler.depth if config.resampler else 0
    layers = depth + (config.predictor.layers if config.predictor else 0)
    if layers > tensors:
        raise ValueError(f"Its config has {layers} layers, but the file holds no more than {tensors} tensors.")


def _split(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"motion": {}, "added_kv": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise ValueError(f"It holds a tensor {name!r} that belongs to no part of an SMP.")
        parts[part][rest] = tensor
    return parts
