"""Full-size SD1.5 with full-size AnimateDiff v2 and v3 against diffusers, float32: `python dev.py bench motion_parity`.

All 1.3 billion weights are seeded noise and shared between both sides. Prints the relative error of the whole UNet's
output, with and without the one thing that diffusers does in its own way, the seconds, and the memory it took.
"""

from __future__ import annotations

import resource
import time

import torch

from ..devtools.pack_alias import PACK_ROOT
from ..devtools.tiny.motion import FULL_V2, FULL_V3, SD15_LAYOUT, ensure_motion_module, published, seeded_sd15
from ..devtools.tiny.motion_oracle import (
    record_unet_calls,
    reference_output,
    reference_unet,
    relative_error,
    sample_video,
)
from ..nodes.animatediff.loader import load_motion_module
from ..nodes.animatediff.nodes import StoryApplyMotionModule

FRAMES = 4
SIZE = 16
FULL_UNET = {**SD15_LAYOUT, "channel_mult": [1, 2, 4, 4]}


def main() -> None:
    base = seeded_sd15(FULL_UNET)
    for spec in (FULL_V2, FULL_V3):
        motion = load_motion_module(str(ensure_motion_module(spec, PACK_ROOT / ".dev" / "models" / "full_size")))
        weights = published(motion.model.state_dict())
        model, calls = record_unet_calls(StoryApplyMotionModule.execute(base, motion).result[0])
        start = time.monotonic()
        sample_video(model, FRAMES, SIZE)
        seconds = time.monotonic() - start
        errors = []
        for pooled_norm in (False, True):
            reference = reference_unet(base.model.diffusion_model, spec.config, weights, pooled_norm=pooled_norm)
            errors.append(relative_error(calls[0].output, reference_output(reference, calls[0])))
        parameters = sum(tensor.numel() for tensor in weights.values()) / 1e6
        print(
            f"{spec.file_name}: {parameters:.1f} M parameters, {FRAMES} frames of {SIZE} x {SIZE} latents, "
            f"{len(calls[0].x)} rows in {seconds:.1f} s; relative error {errors[0]:.1e} "
            f"(group norm pooled over frames, as diffusers has it: {errors[1]:.1e})"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB; {torch.__version__=}")


if __name__ == "__main__":
    main()
