"""What a run starts from: an SMP with a predictor, from a file or from a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...checkpoint import FORMAT, load_checkpoint
from ...config import SMPConfig, SMPModelConfig, build_dataclass
from ...injection import AddedKV
from ...ip_adapter import load_ip_adapter
from ...model import SemanticMotion, SMPWeights
from ..config import TrainConfig
from ..digest import weights_digest


def start_smp(config: TrainConfig) -> tuple[SemanticMotion, AddedKV]:
    """The SMP that a run starts from; random weights, where there are any, follow from the seed.

    Raises:
        ValueError: no start and no model, or a predictor of another shape than the file's.
    """
    weights = read_smp(Path(config.start)) if config.start else None
    if weights is None and not config.model:
        raise ValueError("The config names neither `start` (an IP-Adapter or SMP file) nor a [model].")
    if weights is not None and config.model:
        raise ValueError("The config has both `start` and a [model]; `start` brings its own model. Remove one.")
    model = weights.config if weights else SMPModelConfig.from_dict(config.model)
    predictor = model.predictor or predictor_config(config, model)
    if model.predictor is not None and config.predictor and predictor_config(config, model) != predictor:
        raise ValueError(f"{config.start} has a predictor of another shape than [predictor]; remove that section.")
    guidance = config.guidance if config.stage == "decoding" else model.guidance
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        motion = SemanticMotion(replace(model, predictor=predictor, guidance=guidance))
    added_kv = AddedKV(model.sites, model.output_shape[1])
    if weights is not None:
        fresh = {name: value for name, value in motion.state_dict().items() if name.startswith("predictor.")}
        motion.load_state_dict({**fresh, **weights.motion})
        added_kv.load_state_dict(weights.added_kv)
    return motion.float(), added_kv.float()


def predictor_config(config: TrainConfig, model: SMPModelConfig) -> SMPConfig:
    """The config's predictor on the model's token space."""
    tokens, width = model.token_shape
    return build_dataclass(
        SMPConfig, {"tokens": tokens, "width": width, "max_frames": config.frames, **config.predictor}
    )


def read_smp(path: Path) -> SMPWeights:
    """Read an SMP checkpoint or IP-Adapter weights (`.safetensors`, or `.bin` with weights only).

    Raises:
        ValueError: no such file, or another kind of file.
    """
    if not path.is_file():
        raise ValueError(f"There is no file at {path} to start from.")
    if _is_smp(path):
        return load_checkpoint(path)
    try:
        return load_ip_adapter(_read_tensors(path))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be started from. {error}") from error


def _is_smp(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except SafetensorError:
        return False


def _read_tensors(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def token_space(motion: SemanticMotion) -> dict[str, Any]:
    """What embeddings must have been made with to fit this SMP: plain types, to be compared."""
    resampler: dict[str, Tensor] = {} if motion.resampler is None else motion.resampler.state_dict()
    return {
        "token_space": motion.config.token_space,
        "uncond": motion.config.uncond,
        "tokens": list(motion.config.token_shape),
        "resampler": weights_digest(resampler) if resampler else "",
    }
