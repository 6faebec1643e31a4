"""Training of the toy model: deterministic, resumable, never half a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from storydiffusion.devtools.toy.train import Config, Trainer, run

CPU = torch.device("cpu")
CONFIG = Config(samples=24, batch=4, parts=2, prompts=8, warmup_steps=2)


@pytest.mark.slow
def test_resumed_run_equals_unbroken_run(tmp_path: Path) -> None:
    whole = Trainer(CONFIG, CPU)
    losses = [whole.advance() for _ in range(5)]

    broken = Trainer(CONFIG, CPU)
    assert [broken.advance() for _ in range(3)] == losses[:3]
    broken.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(CONFIG, CPU)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert [resumed.advance() for _ in range(2)] == losses[3:]

    for mine, theirs in zip(resumed.average, whole.average, strict=True):
        assert torch.equal(mine, theirs)


def test_two_parts_make_one_gradient() -> None:
    """Parts share their weights, and an update moves those of all."""
    trainer = Trainer(CONFIG, CPU)
    trainer.advance()
    for first, second in zip(*(unet.parameters() for unet in trainer.unets), strict=True):
        assert first.data_ptr() == second.data_ptr()


@pytest.mark.slow
def test_run_writes_weights_and_another_run_is_refused(tmp_path: Path) -> None:
    config = Config(samples=8, batch=4, parts=2, prompts=8)
    lines = list(run(Trainer(config, CPU), tmp_path))
    assert lines[-1] == "done: 2 steps, 8 samples"
    assert (tmp_path / "toy_world.safetensors").stat().st_size < 12_000_000
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(SystemExit, match="another run"):
        list(run(Trainer(Config(samples=8, batch=4, parts=2, prompts=8, seed=2), CPU), tmp_path))


def test_a_run_may_be_given_more_samples_while_its_rate_is_up() -> None:
    short, long = Config(samples=16_000), Config(samples=32_000)
    plateau = int(short.steps * (1 - short.decay))
    assert short.rate(plateau - 1) == long.rate(plateau - 1) == short.learning_rate
    assert short.rate(plateau + 50) < short.learning_rate
    assert short.rate(short.steps) == 0


@pytest.mark.slow
def test_a_loss_falls() -> None:
    trainer = Trainer(Config(samples=4000, batch=4, prompts=4, warmup_steps=5, learning_rate=2e-3), CPU)
    losses = [trainer.advance() for _ in range(16)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
