"""What a long story costs in windows: peak memory and time a panel, against the number of panels.

Draws on the toy world's model at four times its picture size, so that activations and not weights fill the memory, or
on a UNet with SD1.5's own channels and heads, few blocks and random weights: latents weigh as little beside activations
there as in SD1.5. Each row runs in a process of its own. Memory is the most that tensors take at one time during
sampling, beyond what was there before. Times are relative to the first row's time per panel.

    python dev.py bench windows [--unet toy] [--window 4] [--panels 8 16 32 64] [--steps 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import comfy.sample
import comfy.sd
import torch

from ..devtools.environment.preparation import REPOSITORY
from ..devtools.tiny.checkpoints import TINY_SD15, ensure_checkpoint
from ..devtools.toy import model as toy_model
from ..nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention
from .measuring.live_tensors import LiveTensors

LATENT_SIZES = {"toy": 64, "sd15": 16}
"""Height and width of the latents, by UNet."""


@dataclass(frozen=True)
class Cost:
    """Of one story."""

    mebibytes: float
    seconds: float


def load(unet: str) -> tuple[Any, Any]:
    """MODEL and CLIP of one of LATENT_SIZES."""
    if unet == "toy":
        return toy_model.load()[:2]
    path = ensure_checkpoint(TINY_SD15, REPOSITORY / ".dev" / "models" / "checkpoints")
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(path))
    return model, clip


def measure(unet: str, panels: int, window: int, steps: int) -> Cost:
    """Sample `panels` panels in windows of `window` (0: one batch), with guidance."""
    model, clip = load(unet)
    patched = StoryApplyConsistentSelfAttention.execute(model, 0.5, 0, 0.0, 1.0, "decoder", window).result[0]
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a man, standing"))

    def sample(rows: int) -> Any:
        latent = torch.zeros(rows, 4, LATENT_SIZES[unet], LATENT_SIZES[unet])
        noise = comfy.sample.prepare_noise(latent, 0)
        return comfy.sample.sample(
            patched,
            noise,
            steps,
            5.0,
            "ddim",
            "ddim_uniform",
            conditioning,
            conditioning,
            latent,
            disable_pbar=True,
            seed=0,
        )

    sample(1)  # weights and tables are there from now on
    begun = time.perf_counter()
    sample(panels)
    seconds = time.perf_counter() - begun
    return Cost(peak_bytes(lambda: sample(panels)) / 2**20, seconds)


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes of tensors that a call has alive at most at one time, beyond what is there before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with LiveTensors() as tensors:
        call()
    return tensors.peak


def measure_apart(unet: str, panels: int, window: int, steps: int) -> Cost:
    """`measure`, in a process of its own."""
    launch = REPOSITORY / "devtools" / "launch.py"
    row = ["--measure", str(panels), str(window), "--steps", str(steps), "--unet", unet]
    command = [sys.executable, str(launch), "storydiffusion.benchmarks.windows", *row]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Cost(**json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", choices=LATENT_SIZES, default="toy")
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--panels", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--measure", type=int, nargs=2, metavar=("PANELS", "WINDOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        panels, window = arguments.measure
        print(json.dumps(asdict(measure(arguments.unet, panels, window, arguments.steps))))
        return
    print("| panels | window | peak MiB | time per panel |\n|---|---|---|---|")
    rows = [(panels, arguments.window) for panels in arguments.panels]
    first = None
    for panels, window in [*rows, *((panels, 0) for panels in arguments.panels[:2])]:
        cost = measure_apart(arguments.unet, panels, window, arguments.steps)
        per_panel = cost.seconds / panels
        first = first or per_panel
        print(f"| {panels} | {window or 'one batch'} | {cost.mebibytes:.0f} | {per_panel / first:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
