"""Whether a server that draws for long stays as it was: its memory, and its pictures.

One real server on small models gets prompts of changing nodes, numbers of panels and sizes; some of them fail, some are
interrupted. Memory is what the server's process has resident after each prompt: the mean of the last fifty prompts
against that of the first fifty, once every kind of prompt has run. A reference graph with every node of the pack, drawn
before, between and after them, must give the same pictures, bit for bit.

    python dev.py bench soak [--prompts 200]

Fails unless memory stays within 2% and the pictures are the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from ..devtools.drivers.server import ComfyServer, Prompt, PromptError
from ..devtools.environment.preparation import REPOSITORY
from ..devtools.workflows.shipped import with_inputs
from ..devtools.workflows.whole_pack import ensure_small_models, whole_pack

SPAN = 50
"""Prompts at either end over which memory is averaged."""
LARGEST_CHANGE = 0.02
VARIANTS = 5
"""Seeds after which every kind of prompt has had all its sizes."""
SAMPLED_LONG = 500
"""Steps of a prompt that is interrupted: it must not be done before."""

SHARING = "StoryApplyConsistentSelfAttention"
Pictures = dict[str, list[bytes]]


@dataclass(frozen=True)
class Job:
    """A prompt, and how it should end: "done", "interrupted", or words of its error."""

    prompt: Prompt
    end: str = "done"


def saving(prompt: Prompt, *names: str) -> Prompt:
    """The prompt with the pictures of these nodes alone saved, so that the server leaves out what they don't need."""
    kept = {f"save {name}" for name in names}
    return {key: node for key, node in prompt.items() if node["class_type"] != "SaveImage" or key in kept}


def everything(seed: int) -> Job:
    return Job(whole_pack(seed=seed))


def page(seed: int) -> Job:
    return Job(saving(whole_pack(seed=seed, panels=1 + seed % 5, width=96), "page"))


def windows(seed: int) -> Job:
    prompt = saving(whole_pack(seed=seed, panels=6), "page")
    changes = {"window": 4, "share": "subjects", "token_choice": "grid", "level_rates": "2: 0.3", "strength": 0.5}
    return Job(with_inputs(prompt, {SHARING: changes}))


def pairs(seed: int) -> Job:
    return Job(saving(whole_pack(seed=seed, panels=3, width=128, height=64 + 32 * (seed % 3)), "joined"))


def motion(seed: int) -> Job:
    return Job(saving(whole_pack(seed=seed, steps=2), "guided frames"))


def video(seed: int) -> Job:
    prompt = saving(whole_pack(seed=seed, panels=3), "video")
    return Job(with_inputs(prompt, {"StorySemanticMotionPredictor": {"frames": 3 + seed % 2}}))


def unreadable_story(seed: int) -> Job:
    return Job(with_inputs(whole_pack(seed=seed), {"StoryPromptSplitter": {"story": "[Zoe] sings"}}), "[Zoe] is not in")


def wrong_batch(seed: int) -> Job:
    prompt = saving(whole_pack(seed=seed), "video", "guided frames")
    prompt["two"]["inputs"]["batch_size"] = 3  # a frame too many, which shows when sampling begins
    return Job(prompt, "frames")


def interrupted_story(seed: int) -> Job:
    return Job(saving(whole_pack(seed=seed, panels=4, steps=SAMPLED_LONG), "page"), "interrupted")


def interrupted_video(seed: int) -> Job:
    prompt = saving(whole_pack(seed=seed), "video")
    return Job(with_inputs(prompt, {"StorySMPVideoDecode": {"steps": SAMPLED_LONG}}), "interrupted")


JOBS: tuple[Callable[[int], Job], ...] = (
    *(everything, page, unreadable_story, windows, interrupted_story),
    *(pairs, motion, wrong_batch, video, interrupted_video),
)


def run(server: ComfyServer, job: Job) -> dict[str, Any]:
    """Run a job to its end and return the outputs; SystemExit if it ends in another way than it should."""

    def interrupt(node: str, done: int, total: int) -> None:
        if total == SAMPLED_LONG:
            with urllib.request.urlopen(urllib.request.Request(f"{server.url}/interrupt", b"", method="POST")):
                pass

    ended, outputs = "done", {}
    try:
        outputs = server.run(job.prompt, on_progress=interrupt if job.end == "interrupted" else None)
    except PromptError as error:
        ended = str(error)
    if job.end not in ended:
        raise SystemExit(f"A prompt should have ended in {job.end!r}, but it ended in {ended!r}.")
    return outputs


def reference_pictures(server: ComfyServer) -> Pictures:
    """All that the reference graph saves; the server has drawn something else before, so it draws it anew."""
    prompt = whole_pack()
    outputs = run(server, Job(prompt))
    saved = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    return {key: [np.asarray(Image.open(path)).tobytes() for path in server.image_paths(outputs, key)] for key in saved}


def soak(server: ComfyServer, prompts: int) -> tuple[list[float], list[Pictures]]:
    """MiB of resident memory after each prompt, and the reference's pictures before, between and after them."""
    process = psutil.Process(server.pid)
    for variant in range(VARIANTS):
        for job in JOBS:
            run(server, job(variant))
    pictures = [reference_pictures(server)]
    memory: list[float] = []
    for number in range(prompts):
        variant, kind = divmod(number, len(JOBS))
        run(server, JOBS[kind](VARIANTS + variant))
        memory.append(process.memory_info().rss / 2**20)
        print(f"\r{number + 1} of {prompts}, {memory[-1]:.0f} MiB", end="", file=sys.stderr, flush=True)
        if number + 1 in (prompts // 2, prompts):
            pictures.append(reference_pictures(server))
    print(file=sys.stderr)
    return memory, pictures


def report(memory: Sequence[float], pictures: Sequence[Pictures]) -> tuple[str, bool]:
    """A table of a soak, from what `soak` gives, and whether memory and pictures stayed."""
    prompts, span = len(memory), min(SPAN, len(memory) // 2)
    ends = Counter(JOBS[number % len(JOBS)](0).end for number in range(prompts))
    failed = prompts - ends["done"] - ends["interrupted"]
    first, last = statistics.mean(memory[:span]), statistics.mean(memory[-span:])
    same = all(found == pictures[0] for found in pictures[1:])
    table = (
        f"| prompts | failed | interrupted | MiB, first {span} | MiB, last {span} | change | most | reference |\n"
        "|---|---|---|---|---|---|---|---|\n"
        f"| {prompts} | {failed} | {ends['interrupted']} | {first:.0f} | {last:.0f} | {last / first - 1:+.1%} "
        f"| {max(memory):.0f} | {'bit-equal' if same else 'differs'} |"
    )
    return table, same and abs(last / first - 1) <= LARGEST_CHANGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    prompts = parser.parse_args().prompts
    models = REPOSITORY / ".dev" / "models"
    ensure_small_models(models)
    with tempfile.TemporaryDirectory() as folder:
        host, log = Path(os.environ["COMFYUI_PATH"]), Path(folder) / "log.txt"
        cpu = not torch.cuda.is_available()
        with ComfyServer(host, Path(folder) / "base", models, cpu=cpu, log=log) as server:
            memory, pictures = soak(server, prompts)
    table, passed = report(memory, pictures)
    print(table)
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
