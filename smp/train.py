"""Train a Semantic Motion Predictor: `python -m smp.train --config run.toml`; see `smp/TRAINING.md`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .training.config import load_config
from .training.run.build import build
from .training.run.loop import train


def main() -> int:
    """Run the command line; 0 when the run reached its last iteration."""
    parser = argparse.ArgumentParser(prog="smp.train", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--config", type=Path, required=True, help="a .toml or .json file; see smp/TRAINING.md")
    parser.add_argument(
        "--measure",
        type=int,
        metavar="N",
        help="train nothing: time N iterations on random data and say what they cost",
    )
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config)
        if arguments.measure is not None:
            from .training.run.measure import measure

            measure(config, arguments.measure)
        else:
            train(config, *build(config))
    except ValueError as error:
        print(f"smp.train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsmp.train: interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
