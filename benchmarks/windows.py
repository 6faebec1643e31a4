"""What a long story costs in windows: peak memory and time a panel, against the number of panels.

Draws on the toy world's model at four times its picture size, so that activations and not weights fill the memory.
Each row runs in a process of its own. Memory is what sampling adds to what was there before: the process's peak on a
CPU, torch's on a GPU. Times are relative to the first row's time per panel.

    python dev.py bench windows [--window 4] [--panels 8 16 32 64] [--steps 2]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import torch

from ..devtools.toy import model as toy_model
from ..nodes.attention_nodes import StoryApplyConsistentSelfAttention

LATENT_SIZE = 64


@dataclass(frozen=True)
class Cost:
    """Of one story."""

    mebibytes: float
    seconds: float


def measure(panels: int, window: int, steps: int) -> Cost:
    """Sample `panels` panels in windows of `window` (0: one batch), with guidance."""
    model, clip, _ = toy_model.load()
    patched = StoryApplyConsistentSelfAttention.execute(model, 0.5, 0, 0.0, 1.0, "decoder", window).result[0]
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a man, standing"))

    def sample(rows: int) -> Any:
        latent = torch.zeros(rows, 4, LATENT_SIZE, LATENT_SIZE)
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

    sample(1)  # weights, tables and threads are there from now on
    before = memory(peak=False)
    begun = time.perf_counter()
    sample(panels)
    return Cost((memory(peak=True) - before) / 2**20, time.perf_counter() - begun)


def memory(*, peak: bool) -> int:
    """Bytes in use now, or at most since the start."""
    if torch.cuda.is_available():
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status)
    assert found, "the kernel tells no memory use"
    return int(found[1]) * 1024


def measure_apart(panels: int, window: int, steps: int) -> Cost:
    """`measure`, in a process of its own."""
    launch = Path(__file__).parents[1] / "devtools" / "launch.py"
    row = ["--measure", str(panels), str(window), "--steps", str(steps)]
    command = [sys.executable, str(launch), "storydiffusion.benchmarks.windows", *row]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Cost(**json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--panels", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--measure", type=int, nargs=2, metavar=("PANELS", "WINDOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(asdict(measure(*arguments.measure, arguments.steps))))
        return
    print("| panels | window | peak MiB | time per panel |\n|---|---|---|---|")
    rows = [(panels, arguments.window) for panels in arguments.panels]
    first = None
    for panels, window in [*rows, *((panels, 0) for panels in arguments.panels[:2])]:
        cost = measure_apart(panels, window, arguments.steps)
        per_panel = cost.seconds / panels
        first = first or per_panel
        print(f"| {panels} | {window or 'one batch'} | {cost.mebibytes:.0f} | {per_panel / first:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
