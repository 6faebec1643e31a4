"""Does the Semantic Motion Predictor learn? Stage (a) from scratch in the toy world: `bench smp_learning --quick`.

Trained with the pack's own loop on encoded clips, measured on ways between panels that no training clip takes. Exits
non-zero unless the trained predictor's error is well below that of linear interpolation, and unless the control, the
same predictor given another clip's end, loses that advantage.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..devtools.toy.animation import FRAMES
from ..devtools.toy.clips import ToyClips
from ..devtools.toy.train_video import PHASES, SEMANTIC_CLIPS, build_stage, in_memory, phase_config
from ..devtools.toy.vision import load_vision
from ..smp.checkpoint import load_checkpoint
from ..smp.evaluation.report import Mean, mean_of
from ..smp.interpolation import interpolate_linear
from ..smp.predictor import SemanticMotionPredictor
from ..smp.training.data.clips import Clip
from ..smp.training.run.loop import train
from ..smp.training.stages.semantic import SMP_FILE, require_predictor

NEEDED = 0.7
"""Share of interpolation's error that the trained predictor must stay below."""


def errors(predicted: Tensor, true: Tensor) -> list[float]:
    """Mean squared error of the frames between the ends, clip by clip: (B, F, N, C) twice."""
    return (predicted - true)[:, 1:-1].square().flatten(1).mean(1).tolist()


@torch.no_grad()
def measure(predictor: SemanticMotionPredictor, clips: Sequence[Clip]) -> dict[str, list[float]]:
    """Errors of all clips by method."""
    true = torch.stack([clip["tokens"] for clip in clips])
    start, end, other = true[:, 0], true[:, -1], true[:, -1].roll(1, dims=0)
    return {
        "trained predictor": errors(predictor(start, end, FRAMES), true),
        "linear interpolation": errors(interpolate_linear(start, end, FRAMES), true),
        "trained predictor, another clip's end": errors(predictor(start, other, FRAMES), true),
        "start again and again": errors(start[:, None].expand_as(true), true),
    }


def failures(rows: dict[str, list[float]]) -> list[str]:
    """What is wrong, in sentences; empty when the predictor has learned."""
    trained, linear, control, _ = (mean_of(values) for values in rows.values())
    wrong = []
    if not trained.mean + 2 * trained.error <= NEEDED * (linear.mean - 2 * linear.error):
        wrong.append(f"the trained predictor's error is {trained}, not well below interpolation's {linear}")
    if not control.mean >= linear.mean:
        wrong.append(f"with another clip's end the error is {control}, below interpolation's {linear}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer clips and iterations: minutes")
    parser.add_argument("--clips", type=int, default=SEMANTIC_CLIPS)
    parser.add_argument("--iterations", type=int, default=PHASES["semantic"]["iterations"])
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    clips, iterations = (3000, 1200) if arguments.quick else (arguments.clips, arguments.iterations)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    begun = time.monotonic()
    reader = load_vision()
    training = in_memory(ToyClips("training", clips, FRAMES, clip=None, clip_vision=reader, seed=arguments.seed))
    held_out = in_memory(ToyClips("held out", 256, FRAMES, clip=None, clip_vision=reader, seed=arguments.seed))
    print(f"{clips} clips encoded in {time.monotonic() - begun:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        changes = {"iterations": iterations, "seed": arguments.seed, "validate_every": iterations}
        config = phase_config("semantic", Path(folder), **changes)
        stage = build_stage("semantic", config, training.blank)
        train(config, stage, training, held_out)
        trained, _ = load_checkpoint(Path(folder) / SMP_FILE).load()
    rows = measure(require_predictor(trained).eval(), [held_out[n] for n in range(len(held_out))])
    print(f"\n{len(held_out)} held-out clips, {iterations} iterations, mean squared error in token space\n")
    for name, values in rows.items():
        figure: Mean = mean_of(values)
        print(f"- {name}: {figure}")
    wrong = failures(rows)
    print("\n".join(f"FAILED: {sentence}" for sentence in wrong) or "The predictor has learned.")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
