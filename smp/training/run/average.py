"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..stages.stage import Stage


class Average:
    """Averaged values of a stage's trained parameters, in float32, by name."""

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Starts as the present values."""
        self.values = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        """values = decay * values + (1 - decay) * trained."""
        parameters = [trained[name] for name in self.values]
        get_ema_multi_avg_fn(decay)(list(self.values.values()), parameters, 0)

    @contextmanager
    def in_place_of(self, stage: Stage) -> Iterator[None]:
        """The stage computes with the averaged weights inside the block."""
        trained = stage.trained()
        own = copy_values(trained)
        load_values(trained, self.values)
        try:
            yield
        finally:
            load_values(trained, own)


def copy_values(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Present values by name."""
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


@torch.no_grad()
def load_values(trained: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Put values in place; ValueError when they are for other parameters."""
    if trained.keys() != values.keys():
        differing = sorted(trained.keys() ^ values.keys())
        raise ValueError(f"The weights are for other parameters than train here; the first to differ: {differing[:3]}.")
    for name, parameter in trained.items():
        parameter.copy_(values[name])
