"""Losses and pictures of clips that are never trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from PIL import Image

from ..config import TrainConfig
from ..data.clips import ClipDataset, DrawnClips, spread, stack
from ..stages.stage import Preview, Stage

PREVIEWS = "previews"
FRAME_MILLISECONDS = 125  # eight frames a second, as AnimateDiff plays its clips


@torch.no_grad()
def validate(config: TrainConfig, stage: Stage, clips: ClipDataset, accelerator: Accelerator, step: int) -> None:
    """Log the mean of every number that the stage measures, and write previews to look at.

    The clips, spread over the set, and the random draws of each are the same at every validation.
    """
    rows = gather_object(_own_rows(config, stage, clips, accelerator))
    means = {f"validation/{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}
    accelerator.log(means, step=step)
    if accelerator.is_main_process:
        for place, number in enumerate(spread(config.preview_clips, len(clips))):
            clip = {name: value.to(accelerator.device) for name, value in clips[number].items()}
            with accelerator.autocast():
                show(stage.preview(clip), f"clip-{place}", accelerator, Path(config.out), step)
    accelerator.wait_for_everyone()


def _own_rows(
    config: TrainConfig, stage: Stage, clips: ClipDataset, accelerator: Accelerator
) -> list[dict[str, float]]:
    """Numbers of the clips that this process measures: every P-th of them."""
    drawn = DrawnClips(clips, stage.fields, stage.draw, config.seed)
    own = spread(config.validation_clips, len(clips))[accelerator.process_index :: accelerator.num_processes]
    rows: list[dict[str, float]] = []
    for first in range(0, len(own), config.micro_batch):
        batch = stack([drawn[number, number] for number in own[first : first + config.micro_batch]])
        with accelerator.autocast():
            values = stage.validate(send_to_device(batch, accelerator.device))
        rows += [dict(zip(values, row, strict=True)) for row in torch.stack([*values.values()], dim=1).tolist()]
    return rows


def show(preview: Preview, name: str, accelerator: Accelerator, out: Path, step: int) -> None:
    """Write pictures as PNG and clips as GIF, and log both; a clip is logged as a row of its frames."""
    folder = out / PREVIEWS / f"step-{step:09d}"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, images in preview.items():
        if len(images) == 1:
            images[0].save(folder / f"{name}-{kind}.png")
        else:
            path = folder / f"{name}-{kind}.gif"
            images[0].save(path, save_all=True, append_images=images[1:], duration=FRAME_MILLISECONDS, loop=0)
        writer = accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_image(f"{name}/{kind}", _row(images), step, dataformats="HWC")


def _row(images: list[Image.Image]) -> np.ndarray:
    return np.concatenate([np.asarray(image.convert("RGB")) for image in images], axis=1)
