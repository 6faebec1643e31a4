"""From a config to the objects that `train` takes."""

from __future__ import annotations

from pathlib import Path

from ..config import TrainConfig
from ..data.shards import EncodedClips
from ..stages.semantic import SemanticStage
from ..stages.stage import Stage
from .start import start_smp, token_space


def build(config: TrainConfig) -> tuple[Stage, EncodedClips, EncodedClips | None]:
    """Stage, training clips and validation clips of a run.

    Raises:
        ValueError: a file or folder that the config names is missing or does not fit the rest.
    """
    if not config.data:
        raise ValueError("The config names no `data`: a folder of shards that `python -m smp.prepare` wrote.")
    motion, added_kv = start_smp(config)
    fields = stage_fields(config)
    clips = _open(config.data, "data", fields, config)
    validation = _open(config.validation_data, "validation_data", fields, config) if config.validation_data else None
    for name, data in (("data", clips), ("validation_data", validation)):
        if data is not None and data.about["space"] != token_space(motion):
            raise ValueError(
                f"{name} holds embeddings of another token space ({data.about['space']}) than this run's SMP "
                f"({token_space(motion)}). Prepare them with the same `start` file."
            )
    if config.stage == "semantic":
        return SemanticStage(motion, added_kv), clips, validation
    from ..stages.load_sd15 import (
        load_decoding_stage,  # diffusers takes seconds to import, and stage (a) never needs it
    )

    return load_decoding_stage(config, motion, added_kv, clips.blank), clips, validation


def stage_fields(config: TrainConfig) -> tuple[str, ...]:
    """What the stage reads of a `Clip`."""
    return ("tokens",) if config.stage == "semantic" else ("tokens", "latents", "text")


def _open(place: str, name: str, fields: tuple[str, ...], config: TrainConfig) -> EncodedClips:
    cache = str(Path(config.cache) / name) if config.cache else ""
    return EncodedClips(place, fields, frames=config.frames, cache=cache, cache_bytes=config.cache_gb * 1e9)
