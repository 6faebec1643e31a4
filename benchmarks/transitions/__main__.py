"""The Semantic Motion Predictor in the toy world, against what would be there without it: `bench transitions`.

Held-out pairs of panels: ways from a pose at a position to a pose at a position that no training saw. Every row draws
the frames between them from the same noise, through the pack's nodes. `--quick` draws fewer, and exits non-zero unless
the predictor beats interpolation by twice the standard error of the difference.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from ...devtools.toy.video_files import MOTION_WEIGHTS, SMP_WEIGHTS
from .drawing import Animator, Sampling
from .rows import (
    ALONE,
    FADED,
    FREE,
    FROZEN,
    LINEAR,
    OWN,
    SMP,
    TRUE,
    WON,
    advantage,
    as_markdown,
    draw_all,
    failures,
    film_strips,
    held_out_shots,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 pairs, held ends only; check that the SMP wins")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=Sampling.steps, help="sampling steps")
    parser.add_argument("--cfg", type=float, default=Sampling.cfg)
    parser.add_argument("--smp", type=Path, default=SMP_WEIGHTS, help="another SMP file of the toy world")
    parser.add_argument("--motion", type=Path, default=MOTION_WEIGHTS, help="another motion module of the toy world")
    parser.add_argument("--out", type=Path, default=Path("output/transitions"))
    arguments = parser.parse_args()
    if arguments.pairs < 2:
        parser.error(f"--pairs is {arguments.pairs}; a standard error takes at least 2")
    sampling = Sampling(steps=arguments.steps, cfg=arguments.cfg)
    torch.set_num_threads(1)  # sums in one order whatever the number of cores
    animator = Animator(sampling, arguments.smp, arguments.motion)
    shots = held_out_shots(8 if arguments.quick else arguments.pairs, seed=5)
    ways = (SMP, LINEAR, ALONE) if arguments.quick else (SMP, LINEAR, ALONE, OWN, *FREE)
    rows, clips = draw_all(animator, shots, ways)

    arguments.out.mkdir(parents=True, exist_ok=True)
    table = as_markdown(rows)
    print(f"\n{len(shots)} held-out pairs, {asdict(sampling)}, torch {torch.__version__}\n\n{table}\n")
    (arguments.out / "transitions.md").write_text(table + "\n")
    (arguments.out / "transitions.json").write_text(json.dumps(rows, indent=1))
    strips = arguments.out / "transitions.png"
    film_strips(clips, [TRUE, SMP.name, LINEAR.name, ALONE.name]).save(strips)
    print(f"True, SMP, linear, motion module alone, one below the other: {strips}")
    for over in [name for name in (LINEAR.name, ALONE.name, OWN.name, FROZEN, FADED) if name in rows]:
        gains = {column: advantage(rows, column, over) for column in (*WON, "arrival", "place")}
        print(f"SMP over {over}: " + ", ".join(f"{c} {g:.3f} ± {e:.3f}" for c, (g, e) in gains.items()))
    wrong = failures(rows)
    print("\n".join(f"FAILED: {sentence}" for sentence in wrong) or "The predictor wins.")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
