"""Encoded clips small enough to train on in a test, and shards of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...smp.training.config import TrainConfig
from ...smp.training.data.clip_files import as_embeddings
from ...smp.training.data.clips import Clip
from ...smp.training.data.shards import write_index, write_shard
from ...smp.training.data.videos import RawClip
from ...smp.training.run.start import start_smp, token_space

FRAMES, WIDTH = 5, 8


def tiny_config(out: Path, **changes: Any) -> TrainConfig:
    """A run of a few thousand weights: one token of width 8, clips of 5 frames."""
    sites = [{"block": "middle", "number": 0, "index": 0, "channels": 8}]
    model = {
        "token_space": "image_embeds",
        "encoder_width": WIDTH,
        "sites": sites,
        "guidance": "concat",
        "uncond": "zero",
    }
    small: dict[str, Any] = {
        "out": str(out),
        "model": model,
        "predictor": {"hidden": 16, "layers": 1, "heads": 2, "head_dim": 8},
        "iterations": 6,
        "learning_rate": 1e-2,
        "warmup": 2,
        "ema": 0.9,
        "frames": FRAMES,
        "workers": 0,
        "global_batch": 4,
        "micro_batch": 4,
        "log_every": 1,
        "checkpoint_every": 1000,
        "validate_every": 1000,
    }
    return TrainConfig(**{**small, **changes})


def curved_clips(count: int, seed: int = 0) -> list[Clip]:
    """Clips that leave the straight line between their ends by a bow that follows from the ends: learnable."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.linspace(0, 1, FRAMES)[:, None, None]
    clips = []
    for _ in range(count):
        start, end = torch.randn(2, 1, WIDTH, generator=generator)
        bow = torch.sin(math.pi * times) * (start - end).roll(1, dims=-1)
        clips.append({"tokens": torch.lerp(start[None], end[None], times) + bow})
    return clips


def write_clips(folder: Path, clips: Sequence[Clip], config: TrainConfig, shard_size: int) -> None:
    """Write clips as shards of embeddings, as `smp.prepare` does."""
    folder.mkdir(parents=True)
    motion, _ = start_smp(config)
    sizes = {}
    for shard, first in enumerate(range(0, len(clips), shard_size)):
        part = [
            as_embeddings(RawClip(f"{number:08d}", "", torch.empty(0)), clip)
            for number, clip in enumerate(clips[first : first + shard_size], start=first)
        ]
        sizes[f"{shard:06d}.tar"] = write_shard(folder / f"{shard:06d}.tar", part)
    blank = {"tokens": torch.zeros(clips[0]["tokens"].shape[1:]).tolist()}
    about = {"kind": "embeddings", "frames": config.frames, "space": token_space(motion), "blank": blank}
    write_index(folder, sizes, about)
