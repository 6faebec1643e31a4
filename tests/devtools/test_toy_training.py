"""Training of the toy model: deterministic, resumable, never half a file."""

from __future__ import annotations

from dataclasses import replace
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
    """A step is the one that a single network takes on the mean of both parts' losses."""
    single = Trainer(replace(CONFIG, batch=CONFIG.batch // 2, parts=1), CPU)
    single.unets *= 2  # both backward passes add to one network's gradient
    losses = [single._backward(part) for part in range(2)]
    for parameter in single.parameters:
        parameter.grad /= 2
    torch.nn.utils.clip_grad_norm_(single.parameters, 1.0)

    trainer, stepped = Trainer(CONFIG, CPU), []
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.optimizer.register_step_pre_hook(
        lambda *_: stepped.extend(parameter.grad.clone() for parameter in trainer.parameters)
    )
    assert trainer.advance() == pytest.approx(sum(losses) / 2, rel=1e-5)
    for own, parameter in zip(stepped, single.parameters, strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-6)
    first, second = (list(unet.parameters()) for unet in trainer.unets)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))  # and it moves both networks
    assert any(not torch.equal(one, old) for one, old in zip(first, before, strict=True))


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
