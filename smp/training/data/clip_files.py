"""Samples of the two kinds of shards: clips as pictures, and clips as embeddings."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pictures import frame_images
from .clips import Clip
from .shards import ShardReader
from .videos import RawClip

JPEG_QUALITY = 95

Encode = Callable[[RawClip], dict[str, Any]]
"""A clip -> a sample for WebDataset's `TarWriter`."""


def as_pictures(clip: RawClip) -> dict[str, Any]:
    """A sample of one JPEG per frame, `00.jpg` on, and `txt`."""
    sample: dict[str, Any] = {"__key__": clip.key, "txt": clip.caption}
    for number, image in enumerate(frame_images(clip.frames)):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        sample[f"{number:02d}.jpg"] = buffer.getvalue()
    return sample


def from_pictures(reader: ShardReader, number: int) -> RawClip:
    """Clip `number` of shards that `as_pictures` filled."""
    files = reader.files(number)
    frames = [_read_image(files[name]) for name in sorted(files) if name.endswith(".jpg")]
    return RawClip(files["__key__"].decode(), files["txt"].decode(), torch.stack(frames))


def as_embeddings(clip: RawClip, encoded: Clip) -> dict[str, Any]:
    """A sample of one float16 array for each entry of an encoded clip."""
    arrays = {f"{name}.npy": value.half().cpu().numpy() for name, value in encoded.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{clip.key}: {name} holds numbers beyond float16, so it cannot be stored.")
    return {"__key__": clip.key, **arrays}


def clips_of_shard(reader: ShardReader, shard: int) -> Iterator[RawClip]:
    """All clips of one shard of pictures."""
    first = sum(reader.shard_sizes[:shard])
    for number in range(first, first + reader.shard_sizes[shard]):
        yield from_pictures(reader, number)


def _read_image(content: bytes) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).copy()).float() / 255
