"""WebDataset shards of clips: written whole or not at all, read by index in any order.

A set is a folder (or a URL) of tar files with `index.json`: {"format", "shards": [{"name", "clips"}], "about"}.
WebDataset writes the tars, fetches them from URLs and keeps them in a cache. Its own readers stream, which neither
gives an exact order over several processes nor goes on at a given clip, so samples are found by their place in the
tar here.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from filelock import FileLock
from webdataset.cache import FileCache
from webdataset.gopen import gopen

from ...atomic import atomic_write, write_json
from .clips import Clip

FORMAT = "storydiffusion-smp-clips-1"
INDEX = "index.json"
OPEN_SHARDS = 32  # file handles kept by one reading process


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write samples, as WebDataset's `TarWriter` takes them, to one tar; return how many there were.

    The file appears under its name once it is complete.
    """
    count = 0
    with atomic_write(path) as partial, webdataset.TarWriter(str(partial), mtime=0) as tar:
        for sample in samples:
            tar.write(dict(sample))
            count += 1
    return count


def write_index(folder: Path, shards: Mapping[str, int], about: Mapping[str, Any]) -> None:
    """Write `index.json`: clips in each shard, and what they are."""
    listed = [{"name": name, "clips": clips} for name, clips in sorted(shards.items())]
    write_json(folder / INDEX, {"format": FORMAT, "about": dict(about), "shards": listed})


class ShardReader:
    """The files of one clip after another, from tars of one folder or URL.

    Args:
        place: the folder, or a URL that WebDataset can open.
        cache: folder for shards from a URL; processes that share it download each shard once.
        cache_bytes: how much of it they may fill.

    Raises:
        ValueError: no index, or one of another format.
    """

    def __init__(self, place: str, *, cache: str = "", cache_bytes: float = 1e11) -> None:
        """Reads the index and no shard."""
        self._place = place.rstrip("/")
        self._remote = "://" in place
        if self._remote and not cache:
            raise ValueError(f"{place} is a URL, so `cache` must name a folder for its shards.")
        self._cache = FileCache(cache, cache_size=int(cache_bytes)) if self._remote else None
        self._locks = Path(f"{Path(cache)}.locks")  # beside it: WebDataset removes files there, to make room
        index = self._read_index()
        self.about: dict[str, Any] = index["about"]
        self.names = [shard["name"] for shard in index["shards"]]
        self.shard_sizes = [shard["clips"] for shard in index["shards"]]
        self._ends = list(accumulate(self.shard_sizes))
        self._open: dict[int, _OpenShard] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        """Clips in all shards."""
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay with their process, also where a worker is started by pickling."""
        return {**self.__dict__, "_open": {}}

    def files(self, number: int, extensions: Sequence[str] | None = None) -> dict[str, bytes]:
        """Contents of clip `number`'s files by extension (all, or those asked for), and its key as `__key__`."""
        if not 0 <= number < len(self):
            raise IndexError(f"There is no clip {number}; {self._place} holds {len(self)}.")
        shard = bisect_right(self._ends, number)
        return self._shard(shard).files(number - self._ends[shard] + self.shard_sizes[shard], extensions)

    def _shard(self, shard: int) -> _OpenShard:
        if self._process != os.getpid():  # a forked worker would share its parent's place in every file
            self._open, self._process = {}, os.getpid()
        if shard not in self._open:
            while len(self._open) >= OPEN_SHARDS:  # the one opened first; orders return to a shard once an epoch
                self._open.pop(next(iter(self._open))).close()
            self._open[shard] = _OpenShard(self._local(self.names[shard]))
        return self._open[shard]

    def _local(self, name: str) -> Path:
        url = f"{self._place}/{name}"
        if self._cache is None:
            return Path(url)
        self._locks.mkdir(parents=True, exist_ok=True)
        with FileLock(self._locks / f"{name}.lock"):  # WebDataset has none: all that want it at once would download it
            return Path(self._cache.get_file(url))

    def _read_index(self) -> dict[str, Any]:
        url = f"{self._place}/{INDEX}"
        if not self._remote and not Path(url).is_file():
            raise ValueError(f"There is no {INDEX} in {self._place}; `python -m smp.prepare` makes such a folder.")
        with gopen(url) if self._remote else Path(url).open("rb") as stream:
            index = json.loads(stream.read())
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise ValueError(f"{url} is not an index of format {FORMAT!r}.")
        return index


class _OpenShard:
    """One tar, with the place of every file in it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._path = path

    @cached_property
    def _clips(self) -> list[dict[str, tuple[int, int]]]:
        clips: dict[str, dict[str, tuple[int, int]]] = {}
        with tarfile.open(self._path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                clips.setdefault(key, {})[extension] = (member.offset_data, member.size)
        self._keys = list(clips)
        return list(clips.values())

    def files(self, index: int, extensions: Sequence[str] | None) -> dict[str, bytes]:
        if not 0 <= index < len(self._clips):
            raise ValueError(f"{self._path} holds {len(self._clips)} clips, fewer than its {INDEX} says.")
        contents = {"__key__": self._keys[index].encode()}
        for extension, (offset, size) in self._clips[index].items():
            if extensions is not None and extension not in extensions:
                continue
            self._file.seek(offset)
            contents[extension] = self._file.read(size)
        return contents

    def close(self) -> None:
        self._file.close()


class EncodedClips:
    """Shards of precomputed embeddings as a `ClipDataset`; see `clips.py`.

    Raises:
        ValueError: not a set of embeddings, or clips of another length than asked for.
    """

    def __init__(
        self, place: str, fields: Sequence[str], *, frames: int, cache: str = "", cache_bytes: float = 1e11
    ) -> None:
        """Args: as `ShardReader`; which entries of a `Clip` are read; F, the frames that every clip must have."""
        self._fields = fields
        self._reader = ShardReader(place, cache=cache, cache_bytes=cache_bytes)
        self.about = self._reader.about
        if self.about.get("kind") != "embeddings":
            raise ValueError(f"{place} holds {self.about.get('kind')}, not embeddings; see `python -m smp.prepare`.")
        if self.about["frames"] != frames:
            raise ValueError(f"The clips in {place} have {self.about['frames']} frames, the config says {frames}.")
        self.blank = {name: torch.tensor(value) for name, value in self.about["blank"].items()}

    @property
    def shard_sizes(self) -> list[int]:
        """Clips in each shard."""
        return self._reader.shard_sizes

    def __len__(self) -> int:
        """Clips in all shards."""
        return len(self._reader)

    def __getitem__(self, index: int) -> Clip:
        """One clip, float32."""
        files = self._reader.files(index, [f"{name}.npy" for name in self._fields])
        return {
            name: torch.from_numpy(np.load(io.BytesIO(files[f"{name}.npy"]))).float()
            for name in self._fields
            if f"{name}.npy" in files
        }
