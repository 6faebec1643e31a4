"""What an iteration costs: time and memory of the real loop on random data of the real shapes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ...config import SD15_SITES, ResamplerConfig, SMPModelConfig
from ...injection import AddedKV
from ...model import SemanticMotion
from ..config import TrainConfig
from ..data.clips import Clip
from ..stages.semantic import SemanticStage
from ..stages.stage import Stage
from .build import stage_fields
from .loop import Run
from .start import start_smp

WARM_UP = 3  # iterations that allocate and choose kernels
LATENT = (4, 32, 32)  # a frame of 256 x 256 pixels
TEXT = (77, 768)

PAPER_SHAPE = SMPModelConfig("resampled", 1280, SD15_SITES, "concat", "blank_image", resampler=ResamplerConfig())
"""IP-Adapter Plus's 16 tokens of width 768, as the authors advise."""


@dataclass(frozen=True)
class RandomClips:
    """A `ClipDataset` of random numbers."""

    shapes: dict[str, tuple[int, ...]]
    count: int

    @property
    def shard_sizes(self) -> Sequence[int]:
        """One shard."""
        return [self.count]

    @property
    def blank(self) -> Clip:
        """Zeros."""
        return {"tokens": torch.zeros(self.shapes["tokens"][1:]), "text": torch.zeros(TEXT)}

    def __len__(self) -> int:
        """Number of clips."""
        return self.count

    def __getitem__(self, index: int) -> Clip:
        """One clip."""
        return {name: torch.randn(shape) for name, shape in self.shapes.items()}


def measure(config: TrainConfig, iterations: int) -> None:
    """Print what an iteration costs, as JSON, and what the whole run comes to at that pace.

    The SMP has the shape of the config's `start` or `model`, or else IP-Adapter Plus's, also where `start` is a file
    that isn't there yet; the UNet has SD1.5's. Weights of the UNet are random. Started by several processes it measures
    them together, with the gradients' exchange.

    Raises:
        ValueError: no iterations to measure.
    """
    if iterations < 1:
        raise ValueError(f"--measure is {iterations}; it must be at least 1.")
    start = config.start
    if not config.model and not Path(start).is_file():
        config = replace(config, start="", model=PAPER_SHAPE.to_dict())
    run_config = replace(config, iterations=WARM_UP + iterations)
    stage, clips = random_run(run_config)
    run = Run(run_config, stage)
    if start != config.start and run.accelerator.is_main_process:
        print(f"{start} isn't there yet; an SMP of IP-Adapter Plus's shape is measured instead.", file=sys.stderr)
    batches = run.batches(clips)
    for _ in range(WARM_UP):
        run.advance(batches, 0.0)
    device = run.accelerator.device
    _wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(iterations):
        run.advance(batches, 0.0)
    _wait_for(device)
    seconds = (time.perf_counter() - began) / iterations
    if run.accelerator.is_main_process:
        print(json.dumps(_report(config, run, clips, seconds), indent=1))
    run.accelerator.end_training()


def _report(config: TrainConfig, run: Run, clips: RandomClips, seconds: float) -> dict[str, Any]:
    device = run.accelerator.device
    sizes = run.stage.measures()
    stored = sum(2 * torch.Size(shape).numel() for shape in clips.shapes.values())  # float16
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated()
    else:
        name, memory = f"CPU, {torch.get_num_threads()} threads", psutil.Process().memory_info().rss
    return {
        "stage": config.stage,
        "device": name,
        "processes": run.accelerator.num_processes,
        "mixed_precision": config.mixed_precision,
        "frames": config.frames,
        "global_batch": config.global_batch,
        "micro_batch": config.micro_batch,
        "accumulation": run.accelerator.gradient_accumulation_steps,
        **sizes,
        "seconds_per_iteration": seconds,
        "clips_per_second": config.global_batch / seconds,
        "memory_gb_per_process": memory / 1e9,
        "hours_for_the_run": config.iterations * seconds / 3600,
        "clips_seen_by_the_run": config.iterations * config.global_batch,
        "checkpoint_gb": 16 * sizes["trained_parameters"] / 1e9,  # weights, average and Adam's two moments
        "shard_gb_per_million_clips": stored / 1e3,
    }


def random_run(config: TrainConfig) -> tuple[Stage, RandomClips]:
    """The config's stage with random weights, and one iteration's clips of random numbers."""
    motion, added_kv = start_smp(config)
    tokens, width = motion.config.token_shape
    every = {"tokens": (tokens, width), "latents": LATENT}
    shapes: dict[str, tuple[int, ...]] = {name: (config.frames, *shape) for name, shape in every.items()}
    shapes["text"] = TEXT
    clips = RandomClips({name: shapes[name] for name in stage_fields(config)}, config.global_batch)
    if config.stage == "semantic":
        return SemanticStage(motion, added_kv), clips
    return _random_decoding(config, motion, added_kv, clips.blank), clips


def _random_decoding(config: TrainConfig, motion: SemanticMotion, added_kv: AddedKV, blank: Clip) -> Stage:
    from diffusers import UNetMotionModel

    from ..stages.decoding import DecodingStage
    from ..stages.load_sd15 import make_denoiser

    unet = UNetMotionModel(cross_attention_dim=TEXT[1], num_attention_heads=8)  # all else is SD1.5's by default
    return DecodingStage(motion, make_denoiser(unet, added_kv, config, None), config, blank)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
