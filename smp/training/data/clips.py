"""What training reads: the interface of a set of encoded clips, and its two smallest implementations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Clip = dict[str, Tensor]
"""One encoded clip, float32:

- `tokens` (F, N, C): every true frame in the SMP's token space (`SemanticMotion.tokens` of the encoder's output).
- `latents` (F, c, h, w), decoding stage only: every frame as the denoiser sees it, scaled.
- `text` (T, D), decoding stage only: the caption as the denoiser's cross-attention reads it.
"""


class ClipDataset(Protocol):
    """Encoded clips in shards, numbered through.

    Attributes:
        shard_sizes: clips in each shard. A set without shards is one shard.
        blank: what unconditional rows see: `tokens` (N, C), and for the decoding stage `text` (T, D).
    """

    @property
    def shard_sizes(self) -> Sequence[int]: ...  # noqa: D102 (see above)

    @property
    def blank(self) -> Clip: ...  # noqa: D102

    def __len__(self) -> int: ...  # noqa: D105

    def __getitem__(self, index: int, /) -> Clip: ...  # noqa: D105


class ClipsInMemory:
    """A small set of clips as one shard."""

    def __init__(self, clips: Sequence[Clip], blank: Clip) -> None:
        """Args: see `ClipDataset`."""
        self._clips, self.blank = clips, blank

    @property
    def shard_sizes(self) -> Sequence[int]:
        """One shard."""
        return [len(self._clips)]

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._clips)

    def __getitem__(self, index: int) -> Clip:
        """One clip."""
        return self._clips[index]


class DrawnClips(Dataset[Clip]):
    """Clips by (position, number), each with the random draws of its position.

    A draw depends on seed and position alone: not on the process, the worker or the iteration that training was
    resumed at.
    """

    def __init__(
        self,
        clips: ClipDataset,
        fields: Sequence[str],
        draw: Callable[[Clip, torch.Generator], Clip],
        seed: int,
    ) -> None:
        """Args: the clips; `fields` and `draw` of the stage; the run's seed."""
        self._clips, self._fields, self._draw, self._seed = clips, fields, draw, seed

    def __getitem__(self, place: tuple[int, int]) -> Clip:
        """The clip with its draws."""
        position, number = place
        clip = self._clips[number]
        missing = [name for name in self._fields if name not in clip]
        if missing:
            raise ValueError(f"Clip {number} has no {missing}; it has {sorted(clip)}. This stage needs all of them.")
        clip = {name: clip[name] for name in self._fields}
        return {**clip, **self._draw(clip, generator_at(self._seed, position))}


def generator_at(seed: int, position: int) -> torch.Generator:
    """A CPU generator for one position of a run: the same numbers on every machine and device."""
    state = np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def spread(count: int, total: int) -> list[int]:
    """At most `count` of the numbers 0 to total - 1, always the same: the middles of as many equal parts.

    Neighbouring clips are of one video, so the first of a set stand for few of its videos.
    """
    count = min(count, total)
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]


def stack(clips: Sequence[Clip]) -> Clip:
    """Clips of one shape -> a batch."""
    return {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}


def identity(clips: ClipDataset) -> dict[str, Any]:
    """What tells one set of clips from another without reading it: a run that goes on must have the same order of data.

    Returns:
        Number of clips and shards, and a digest of the shards' sizes and the blank tokens, which are the encoder's.
    """
    digest = hashlib.sha256(json.dumps([*clips.shard_sizes]).encode())
    for name, value in sorted(clips.blank.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return {"clips": len(clips), "shards": len(clips.shard_sizes), "digest": digest.hexdigest()}
