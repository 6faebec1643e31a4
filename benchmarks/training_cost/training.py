"""What one pass of training takes, counted without running it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...smp.training.config import TrainConfig
from ...smp.training.data.clips import Clip, DrawnClips, stack
from ...smp.training.run.measure import PAPER_SHAPE, RandomClips, random_run
from ...smp.training.stages.decoding import DecodingStage
from ...smp.training.stages.load_sd15 import PRECISIONS, animatediff_scheduler
from ...smp.training.stages.stage import Stage
from ..measuring.live_tensors import LiveTensors


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass of `micro_batch` clips, with the optimiser's step."""

    tflop: float
    gigabytes: float


def paper_configs() -> list[TrainConfig]:
    """Both stages as `smp/TRAINING.md` launches them."""
    shape = PAPER_SHAPE.to_dict()
    return [
        TrainConfig(stage="semantic", model=shape, mixed_precision="bf16"),
        TrainConfig(stage="decoding", model=shape, mixed_precision="bf16"),
    ]


def count(config: TrainConfig) -> Cost:
    """Count a pass without running it."""
    with torch.device("meta"):
        stage, clips = random_run(replace(config, global_batch=config.micro_batch))
    with FakeTensorMode(), LiveTensors() as tensors:
        _without_content(stage)
        training = Training(config, stage, clips)
        training.advance()  # from here on the optimiser has its moments
        training.advance()
        gigabytes = tensors.peak / 1e9
        # Only plain attention is counted; it does what the fused kernels do, which keep less.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operations:
            training.advance()
    return Cost(operations.get_total_flops() / 1e12, gigabytes)


class Training:
    """What `smp.training.run.loop.Run` holds and does for one pass, without Accelerate."""

    def __init__(self, config: TrainConfig, stage: Stage, clips: RandomClips) -> None:
        self.config, self.stage, self.clips = config, stage, clips
        trained = stage.trained()
        self.optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate)
        self.average = [torch.empty_like(parameter) for parameter in trained.values()]

    def advance(self) -> None:
        """One pass and one step."""
        with torch.autocast("cpu", dtype=PRECISIONS[self.config.mixed_precision], enabled=self._mixed()):
            loss = self.stage(self._batch()).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _batch(self) -> Clip:
        drawn = DrawnClips(self.clips, self.stage.fields, self.stage.draw, self.config.seed)
        return stack([drawn[(number, number)] for number in range(self.config.micro_batch)])

    def _mixed(self) -> bool:
        return self.config.mixed_precision != "no"


def _without_content(stage: Stage) -> None:
    """Give weights that were made on the meta device a place, but no content."""
    stage._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
    if isinstance(stage, DecodingStage):
        stage.denoiser.scheduler = animatediff_scheduler()  # its table isn't among the module's buffers


def hours(config: TrainConfig, cost: Cost, devices: int, tflops: float) -> float:
    """Of the whole run on so many devices, if each does `tflops` TFLOP/s all the time."""
    passes = config.iterations * config.global_batch / config.micro_batch
    return passes * cost.tflop / (devices * tflops) / 3600
