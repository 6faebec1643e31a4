"""Which clip is trained on when: a pure function of seed and position, so nothing of it has to be saved.

Clips are numbered over the whole run: iteration t holds positions t * B to (t + 1) * B - 1, B the global batch. The
number of processes does not enter, so one process and a hundred see the same clips in the same iterations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class ClipOrder:
    """The clip at every position of a run.

    Shard i belongs to stream i modulo `streams` for good, and stream s fills the s-th part of every batch: a process
    that computes that part reads no other shards. In each of its epochs a stream shuffles its shards, and then the
    clips among `shuffle_shards` of them at a time.

    Args:
        shard_sizes: clips in each shard; clips are numbered through in this order.
        batch: B, clips per iteration.
        seed: of the order.
        streams: a divisor of `batch`, at most the number of shards.
        shuffle_shards: how many shards are mixed.

    Raises:
        ValueError: no clips, or more streams than shards.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, batch: int, seed: int, streams: int = 1, shuffle_shards: int = 8
    ) -> None:
        """Nothing is computed before it is asked for."""
        if not sum(shard_sizes):
            raise ValueError("The data holds no clips at all; prepare some videos first.")
        filled = [shard for shard, size in enumerate(shard_sizes) if size]
        if streams > len(filled):
            raise ValueError(f"streams is {streams}; there are only {len(filled)} shards with clips in them.")
        ends = np.cumsum(shard_sizes)
        self._shards = [(int(end) - size, int(end)) for end, size in zip(ends, shard_sizes, strict=True)]
        self._streams = [filled[stream::streams] for stream in range(streams)]
        self._sizes = [sum(shard_sizes[shard] for shard in shards) for shards in self._streams]
        self._batch, self._seed, self._shuffle_shards = batch, seed, shuffle_shards
        self._epochs: dict[int, tuple[int, NDArray[np.int64]]] = {}  # the running epoch of each stream

    def clip(self, position: int) -> int:
        """Number of the clip at `position`."""
        step, slot = divmod(position, self._batch)
        share = self._batch // len(self._streams)
        stream, slot = divmod(slot, share)
        epoch, index = divmod(step * share + slot, self._sizes[stream])
        return int(self._epoch(stream, epoch)[index])

    def _epoch(self, stream: int, epoch: int) -> NDArray[np.int64]:
        if self._epochs.get(stream, (-1,))[0] != epoch:
            self._epochs[stream] = epoch, self._shuffled(stream, epoch)
        return self._epochs[stream][1]

    def _shuffled(self, stream: int, epoch: int) -> NDArray[np.int64]:
        random = np.random.default_rng([self._seed, stream, epoch])
        shards = [self._shards[shard] for shard in random.permutation(self._streams[stream])]
        mixed = []
        for first in range(0, len(shards), self._shuffle_shards):
            clips = np.concatenate([np.arange(*ends) for ends in shards[first : first + self._shuffle_shards]])
            mixed.append(random.permutation(clips))
        return np.concatenate(mixed)


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one process computes."""

    process: int
    processes: int
    micro_batch: int

    def micro_batches(self, step: int, batch: int) -> Iterator[range]:
        """Positions of iteration `step`, one forward pass after the other."""
        own = batch // self.processes
        first = step * batch + self.process * own
        for start in range(first, first + own, self.micro_batch):
            yield range(start, start + self.micro_batch)


class ProcessBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler of one process: lists of (position, clip), from iteration `first` to before `last`."""

    def __init__(self, order: ClipOrder, share: Share, *, batch: int, first: int, last: int) -> None:
        """Args: the order of clips, this process's share, B, first iteration, last iteration."""
        self._order, self._share, self._batch, self._steps = order, share, batch, range(first, last)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """One list per forward pass."""
        for step in self._steps:
            for positions in self._share.micro_batches(step, self._batch):
                yield [(position, self._order.clip(position)) for position in positions]

    def __len__(self) -> int:
        """Number of forward passes."""
        return len(self._steps) * self._batch // self._share.processes // self._share.micro_batch
