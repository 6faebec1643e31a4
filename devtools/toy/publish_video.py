"""Write the toy world's video weights as they are shipped, from the runs that trained them.

python devtools/launch.py storydiffusion.devtools.toy.publish_video --semantic FOLDER --decoding FOLDER --out FOLDER

The predictor is stage (a)'s, the projections and the motion module are stage (b)'s. Stage (b) trains the predictor as
well, as the paper does, but to the denoising loss alone any embedding is good that draws the right frame: the predictor
leaves the encoder's space, and what it says of clothes becomes worse.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import safetensors.torch
from safetensors import safe_open

from ...smp.training.run.checkpoints import load_latest
from ...smp.training.stages.semantic import SMP_FILE
from .export import write_weights
from .video_files import MOTION_WEIGHTS, SMP_WEIGHTS
from .vision import WEIGHTS as VISION_WEIGHTS

PREDICTOR = "motion.predictor."
"""Its weights in an SMP file."""


def publish(semantic: Path, decoding: Path, out: Path) -> None:
    """Both files in half precision from finished runs, each with how it was made beside it."""
    record = {
        "semantic": _config(semantic),
        "decoding": _config(decoding),
        "encoder": hashlib.sha256(VISION_WEIGHTS.read_bytes()).hexdigest(),
    }
    motion = safetensors.torch.load_file(decoding / MOTION_WEIGHTS.name)
    write_weights(motion, out / MOTION_WEIGHTS.name, record)
    with safe_open(decoding / SMP_FILE, framework="pt") as file:
        kept = file.metadata() or {}
    decoder, predictor = (safetensors.torch.load_file(run / SMP_FILE) for run in (decoding, semantic))
    smp = {name: (predictor if name.startswith(PREDICTOR) else decoder)[name] for name in decoder}
    write_weights(smp, out / SMP_WEIGHTS.name, record, metadata=kept)


def _config(run: Path) -> str:
    """The config of a finished run, as JSON; SystemExit if it isn't finished."""
    state = load_latest(run)
    if state is None:
        raise SystemExit(f"{run} holds no checkpoint.")
    if state["step"] < state["config"]["iterations"]:
        raise SystemExit(f"{run} is at iteration {state['step']} of {state['config']['iterations']}.")
    return json.dumps(state["config"] | {"out": "FOLDER"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--semantic", type=Path, required=True, help="folder of the semantic run")
    parser.add_argument("--decoding", type=Path, required=True, help="folder of the decoding run")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    publish(arguments.semantic, arguments.decoding, arguments.out)


if __name__ == "__main__":
    main()
