"""What training the SMP at the paper's scale takes, counted: operations and memory of one pass on one device.

    python dev.py bench training_cost [--micro-batch 8 1]

The pack's own stages run forward, backward and through AdamW on tensors without content (FakeTensorMode), so neither a
GPU nor the memory is needed. Operations are those of matrix products and convolutions. Memory is the most that tensors
take at one time: weights, average, optimiser, activations; what kernels and the allocator need besides is not in it.
What `smp.prepare` takes for a clip before that is counted in the same way.
The hours are for hardware that does nothing else, at the peak rate given: less than any real run will take.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..smp.training.clips import Clip, DrawnClips, stack
from ..smp.training.config import TrainConfig
from ..smp.training.decoding import DecodingStage
from ..smp.training.load_sd15 import PRECISIONS, animatediff_scheduler
from ..smp.training.measure import PAPER_SHAPE, RandomClips, random_run
from ..smp.training.stage import Stage
from ._live_tensors import LiveTensors
from ._preparation_cost import count_latents, count_tokens

A100 = 312.0
"""TFLOP/s in bfloat16 on tensor cores, by its data sheet."""


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
    """What `smp.training.loop.Run` holds and does for one pass, without Accelerate."""

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8, 1], help="clips of a pass")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=A100, help="of one device, at its peak (default: A100, bf16)")
    arguments = parser.parse_args()
    configs = [replace(config, micro_batch=clips) for config in paper_configs() for clips in arguments.micro_batch]
    print(f"{arguments.devices} devices of {arguments.tflops:g} TFLOP/s, torch {torch.__version__}\n")
    print("| stage | precision | clips a pass | TFLOP a pass | GB of tensors | iterations | hours at peak rate |")
    print("|---|---|---|---|---|---|---|")
    for config in configs:
        cost = count(config)
        least = hours(config, cost, arguments.devices, arguments.tflops)
        print(
            f"| {config.stage} | {config.mixed_precision} | {config.micro_batch} | {cost.tflop:.2f} | "
            f"{cost.gigabytes:.1f} | {config.iterations} | {least:.1f} |",
            flush=True,
        )
    print_preparation(paper_configs()[-1], arguments.devices, arguments.tflops)


def print_preparation(config: TrainConfig, devices: int, tflops: float) -> None:
    """What comes before: a clip's encoding; decoding of videos, which the CPU does, isn't counted."""
    print("\n| prepare | precision | TFLOP a clip | GB of tensors | hours for a million clips at peak rate |")
    print("|---|---|---|---|---|")
    for what, counted in (("tokens", count_tokens(config)), ("latents", count_latents(config))):
        least = 1e6 * counted.tflop / (devices * tflops) / 3600
        print(f"| {what} | {config.mixed_precision} | {counted.tflop:.2f} | {counted.gigabytes:.1f} | {least:.1f} |")


if __name__ == "__main__":
    main()
