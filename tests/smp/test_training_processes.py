"""`python -m smp.train` as a user runs it: killed at any moment, and on several processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from storydiffusion.devtools.tiny.clips import curved_clips, tiny_config, write_clips
from storydiffusion.smp.checkpoint import load_checkpoint
from storydiffusion.smp.training.config import TrainConfig
from storydiffusion.smp.training.run.build import build
from storydiffusion.smp.training.run.loop import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run over 13 clips in 4 shards, with two forward passes an iteration."""
    config = tiny_config(tmp_path / "run", data=str(tmp_path / "clips"), global_batch=4, micro_batch=2)
    write_clips(tmp_path / "clips", curved_clips(13), config, shard_size=4)
    return config


def start(config: TrainConfig, **environment: str) -> subprocess.Popen[bytes]:
    """Start the command from the repository's root, where `smp` is a package of its own."""
    path = Path(config.out).with_suffix(".json")
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    command = [sys.executable, "-m", "smp.train", "--config", str(path)]
    single = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, **single, **environment}, stderr=subprocess.DEVNULL
    )


def losses(out: str) -> dict[int, float]:
    """Loss by iteration, as TensorBoard shows it."""
    log = EventAccumulator(str(Path(out) / "log"), size_guidance={"scalars": 0}).Reload()
    events = [(event.step, event.value) for event in log.Scalars("loss")]
    assert len(events) == len(dict(events)), "an iteration was logged twice"
    return dict(events)


def checkpoint_steps(out: str) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (Path(out) / "checkpoints").glob("step-*.pt"))


def final_state(config: TrainConfig) -> dict:
    path = Path(config.out) / "checkpoints" / f"step-{config.iterations:09d}.pt"
    return torch.load(path, weights_only=True)


def kill_when(process: subprocess.Popen[bytes], config: TrainConfig, step: int) -> None:
    """SIGKILL as soon as a checkpoint of `step` or later is there: mostly amid the next ones being written."""
    deadline = time.monotonic() + 60
    while not any(found >= step for found in checkpoint_steps(config.out)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(config: TrainConfig) -> None:
    config = replace(config, iterations=90, checkpoint_every=3)
    Path(config.out).mkdir()
    (Path(config.out) / ".smp.safetensors.killed").touch()  # what a kill amid the export leaves behind
    kill_when(start(config), config, step=9)
    reached = checkpoint_steps(config.out)[-1]
    assert reached < 70
    kill_when(start(config), config, step=reached + 12)
    assert checkpoint_steps(config.out)[-1] < config.iterations
    # Processes of one thread too: sums over several threads differ in the last digit.
    assert start(config).wait(timeout=120) == 0
    unbroken = replace(config, out=config.out + "-unbroken")
    assert start(unbroken).wait(timeout=120) == 0
    assert losses(config.out) == losses(unbroken.out)
    assert len(losses(config.out)) == config.iterations
    resumed, whole = final_state(config), final_state(unbroken)
    for part in ("trained", "average"):
        assert resumed[part].keys() == whole[part].keys()
        for name, tensor in whole[part].items():
            assert torch.equal(resumed[part][name], tensor), name
    exported, expected = (load_checkpoint(Path(run.out) / "smp.safetensors") for run in (config, unbroken))
    assert exported.config == expected.config
    assert all(torch.equal(exported.motion[name], tensor) for name, tensor in expected.motion.items())
    files = [path.name for path in Path(config.out).rglob("*")]
    leftovers = [name for name in files if name.endswith(".partial") or name.startswith(".")]
    assert not leftovers


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(config: TrainConfig) -> None:
    config = replace(config, iterations=8, streams=2)
    train(config, *build(config))
    two = replace(config, out=config.out + "-two", micro_batch=1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    processes = [start(two, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    assert [process.wait(timeout=90) for process in processes] == [0, 0]
    one_process, two_processes = losses(config.out), losses(two.out)
    assert one_process.keys() == two_processes.keys()
    assert list(two_processes.values()) == pytest.approx(list(one_process.values()), rel=1e-5)
    assert len({round(loss, 4) for loss in one_process.values()}) > 4  # they are no constant
    alone, together = final_state(config)["trained"], final_state(two)["trained"]
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
