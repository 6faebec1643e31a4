"""Sampling with Consistent Self-Attention leaves the model as it was: after success, error and interrupt."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.sample
import pytest
import torch
from storydiffusion.tests.helpers.sharing import share

PANELS = 3
OWN_STATE = ("patches", "object_patches", "weight_wrapper_patches", "hook_patches", "wrappers", "callbacks")


def sample(model: Any, callback: Any = None) -> torch.Tensor:
    latent = torch.zeros(PANELS, 4, 8, 8)
    generator = torch.Generator().manual_seed(1)
    positive, negative = ([[torch.randn(rows, 77, 768, generator=generator), {}]] for rows in (PANELS, 1))
    noise = comfy.sample.prepare_noise(latent, 5)
    return comfy.sample.sample(
        model, noise, 2, 5.0, "euler", "normal", positive, negative, latent, callback=callback, seed=5
    )


def leaves(value: Any) -> Iterator[Any]:
    """What nested dictionaries and lists hold, with the way to it; objects by identity."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from ((key, *leaf) for leaf in leaves(entry))
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from ((number, *leaf) for leaf in leaves(entry))
    else:
        yield (id(value),)


def state_of(patcher: Any) -> dict[str, Any]:
    """All that a run could leave behind: in the live model, in the patcher, and in what is attached to it."""
    live = patcher.model
    return {
        "weights": {name: (value.data_ptr(), float(value.double().sum())) for name, value in live.state_dict().items()},
        "modules": [
            (name, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in live.named_modules()
        ],
        "model_options": set(leaves(patcher.model_options)),
        "attached": [sorted(map(str, leaves(getattr(patcher, name, {})))) for name in OWN_STATE],
    }


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(entry), torch.Tensor) for entry in gc.get_objects())


@pytest.fixture(params=["without windows", "in windows"])
def patched(request: pytest.FixtureRequest, tiny_sd15: tuple[Any, Any, Any]) -> Any:
    return share(tiny_sd15[0], window=2 if request.param == "in windows" else 0)


@pytest.mark.slow
def test_after_success_error_and_interrupt(tiny_sd15: tuple[Any, Any, Any], patched: Any) -> None:
    model = tiny_sd15[0]
    stock, expected = sample(model), sample(patched)  # loads the model; the states after that are compared
    before, tensors = [state_of(model), state_of(patched)], tensors_alive()

    assert torch.equal(sample(patched), expected)
    assert [state_of(model), state_of(patched)] == before

    def fail(*_: Any) -> None:
        raise RuntimeError("a node's callback failed")

    with pytest.raises(RuntimeError, match="a node's callback failed"):
        sample(patched, fail)
    assert [state_of(model), state_of(patched)] == before

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, lambda *_: comfy.model_management.interrupt_current_processing())
    assert [state_of(model), state_of(patched)] == before

    assert torch.equal(sample(patched), expected)
    assert torch.equal(sample(model), stock)
    assert tensors_alive() <= tensors + 2  # the two just compared are gone, and so is every other


@pytest.mark.slow
def test_an_error_within_attention(tiny_sd15: tuple[Any, Any, Any], patched: Any) -> None:
    model = tiny_sd15[0]
    expected = sample(patched)
    before = [state_of(model), state_of(patched)]
    calls = 0

    def fail_after_a_while(attention: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise torch.OutOfMemoryError("a kernel failed")
        return attention(*args, **kwargs)

    failing = patched.clone()
    failing.model_options["transformer_options"]["optimized_attention_override"] = fail_after_a_while
    with pytest.raises(torch.OutOfMemoryError, match="a kernel failed"):
        sample(failing)
    del failing
    assert [state_of(model), state_of(patched)] == before
    assert torch.equal(sample(patched), expected)
