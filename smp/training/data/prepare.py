"""Videos to shards, one job a shard: what is done stays done, and what is broken is listed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ...atomic import PARTIAL, write_json
from .captions import caption_of, captions_digest
from .clip_files import Encode, clips_of_shard
from .plan import agree_on_plan
from .shards import ShardReader, write_index, write_shard
from .videos import BrokenVideoError, ClipShape, RawClip, cut_clips

BROKEN = "broken.json"


@dataclass
class Problems:
    """What a job met on its way: broken files with the reason, and videos without a caption."""

    broken: dict[str, str] = field(default_factory=dict)
    without_caption: int = 0


@dataclass(frozen=True)
class Job:
    """One shard: its name, and the clips that go into it."""

    name: str
    clips: Callable[[Problems], Iterator[RawClip]]


@dataclass(frozen=True)
class Source:
    """Jobs, the frames of their clips, and all that the clips depend on, by name."""

    jobs: list[Job]
    frames: int
    settings: dict[str, Any]


def video_source(
    folder: Path, names: Sequence[str], captions: dict[str, str], shape: ClipShape, videos_per_shard: int
) -> Source:
    """Jobs of `videos_per_shard` videos each; keys are numbers of the video and of its clip."""

    def clips(first: int, problems: Problems) -> Iterator[RawClip]:
        for number, name in enumerate(names[first : first + videos_per_shard], start=first):
            for index, (caption, frames) in enumerate(_clips_of_video(folder, name, captions, shape, problems)):
                yield RawClip(f"{number:08d}-{index:02d}", caption, frames)

    firsts = range(0, len(names), videos_per_shard)
    jobs = [
        Job(f"{shard:06d}.tar", lambda problems, first=first: clips(first, problems))  # type: ignore[misc]
        for shard, first in enumerate(firsts)
    ]
    settings: dict[str, Any] = {
        "videos": _digest(list(names)),
        "captions": captions_digest(folder, names, captions),
        **asdict(shape),
        "videos_per_shard": videos_per_shard,
    }
    return Source(jobs, shape.frames, settings)


def _clips_of_video(
    folder: Path, name: str, captions: dict[str, str], shape: ClipShape, problems: Problems
) -> Iterator[tuple[str, Tensor]]:
    """Caption and frames of each clip; a broken video is noted."""
    try:
        caption = caption_of(folder, name, captions)
        problems.without_caption += not caption
        for frames in cut_clips(folder / name, shape):
            yield caption, frames
    except BrokenVideoError as error:
        problems.broken[name] = str(error)


def shard_source(reader: ShardReader) -> Source:
    """A job for each shard of pictures; ValueError when the shards hold something else."""
    if reader.about.get("kind") != "clips":
        raise ValueError(f"The source holds {reader.about.get('kind')}; embeddings are made of clips or videos.")
    jobs = [
        Job(name, lambda problems, shard=shard: clips_of_shard(reader, shard))  # type: ignore[misc]
        for shard, name in enumerate(reader.names)
    ]
    digest = _digest([reader.names, reader.shard_sizes, reader.about])
    return Source(jobs, reader.about["frames"], {"clips": digest})


def prepare(
    source: Source,
    out: Path,
    encode: Encode,
    about: dict[str, Any],
    computed: dict[str, Any] | None = None,
    part: tuple[int, int] = (0, 1),
) -> bool:
    """Do the jobs of one part that are not done yet; True when all parts are done and the index is written.

    Args:
        source: all jobs.
        out: folder of the shards.
        encode: from a clip to what is stored.
        about: what the shards hold, for the index; the same in all parts.
        computed: more of it, which may differ in rounding; the index has the first part's.
        part: (i, n): every n-th job from the i-th. Several processes can fill one folder.

    Raises:
        ValueError: the folder was begun from another source or with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "reports").mkdir(exist_ok=True)
    about = {**about, "source": source.settings}
    about |= agree_on_plan(out, about, computed or {})
    own = source.jobs[part[0] :: part[1]]
    done = [job for job in own if _report_path(out, job).is_file()]
    with tqdm(total=len(own), initial=len(done), desc="shards", smoothing=0.1) as bar:
        for job in own:
            if not _report_path(out, job).is_file():
                _do(job, out, encode)
                bar.update()
    return _finish(source, out, about)


def _do(job: Job, out: Path, encode: Encode) -> None:
    problems = Problems()
    count = write_shard(out / job.name, (encode(clip) for clip in job.clips(problems)))
    report = {"clips": count, "broken": problems.broken, "without_caption": problems.without_caption}
    write_json(_report_path(out, job), report)  # last: it says that the shard is done


def _finish(source: Source, out: Path, about: dict[str, Any]) -> bool:
    paths = {job.name: _report_path(out, job) for job in source.jobs}
    if not all(path.is_file() for path in paths.values()):
        return False
    reports = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    broken = {name: reason for report in reports.values() for name, reason in report["broken"].items()}
    write_json(out / BROKEN, broken)
    write_index(out, {name: report["clips"] for name, report in reports.items()}, about)
    for leftover in out.rglob(f".*.tar.*{PARTIAL}"):  # of killed processes; an index may just be in writing
        leftover.unlink(missing_ok=True)
    clips, bare = (sum(report[key] for report in reports.values()) for key in ("clips", "without_caption"))
    print(f"{clips} clips in {len(reports)} shards; {len(broken)} broken files, listed in {out / BROKEN}.")
    if bare:
        print(f"{bare} videos have no caption; their clips train with an empty text.")
    if not clips:
        print(f"There is nothing to train on: every file is broken. See {out / BROKEN}.")
    return True


def _report_path(out: Path, job: Job) -> Path:
    return out / "reports" / f"{job.name}.json"


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
