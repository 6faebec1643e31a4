"""Write the toy world's video weights as they are shipped, from the runs that trained them.

python devtools/launch.py storydiffusion.devtools.toy.publish_video --decoding FOLDER --out FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import safetensors.torch
from safetensors import safe_open

from ...smp.training.checkpoints import load_latest
from ...smp.training.semantic import SMP_FILE
from .export import write_weights
from .video_files import MOTION_WEIGHTS, SMP_WEIGHTS
from .vision import WEIGHTS as VISION_WEIGHTS


def publish(decoding: Path, out: Path) -> None:
    """Both files of a finished decoding run in half precision, each with how it was made beside it."""
    state = load_latest(decoding)
    if state is None:
        raise SystemExit(f"{decoding} holds no checkpoint.")
    if state["step"] < state["config"]["iterations"]:
        raise SystemExit(f"{decoding} is at iteration {state['step']} of {state['config']['iterations']}.")
    encoder = hashlib.sha256(VISION_WEIGHTS.read_bytes()).hexdigest()
    record = {"config": json.dumps(state["config"] | {"out": "FOLDER"}), "encoder": encoder}
    for source, target in ((MOTION_WEIGHTS.name, MOTION_WEIGHTS.name), (SMP_FILE, SMP_WEIGHTS.name)):
        with safe_open(decoding / source, framework="pt") as file:
            kept = file.metadata() or {}
        weights = safetensors.torch.load_file(decoding / source)
        write_weights(weights, out / target, record, metadata=kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--decoding", type=Path, required=True, help="folder of the decoding run")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    publish(arguments.decoding, arguments.out)


if __name__ == "__main__":
    main()
