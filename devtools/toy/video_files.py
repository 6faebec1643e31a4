"""The toy world's video weights as files of a ComfyUI models folder."""

from __future__ import annotations

import shutil
from pathlib import Path

HERE = Path(__file__).parent
MOTION_WEIGHTS = HERE / "toy_motion.safetensors"
SMP_WEIGHTS = HERE / "toy_smp.safetensors"
FOLDERS = {MOTION_WEIGHTS: "animatediff_models", SMP_WEIGHTS: "smp"}


def install_video_files(models: Path) -> None:
    """Copy them to where Load Motion Module and Load SMP look."""
    for path, folder in FOLDERS.items():
        (models / folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, models / folder / path.name)
