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
from dataclasses import replace

import torch

from ...smp.training.config import TrainConfig
from .preparation import count_latents, count_tokens
from .training import count, hours, paper_configs

A100 = 312.0
"""TFLOP/s in bfloat16 on tensor cores, by its data sheet."""


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
