"""Which step of a sampling a model call belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

STEP_KEY = "storydiffusion_step"
"""Entry of transformer_options: the `SamplingStep` of the running model call."""


CLOSE = 0.01
"""Length of a step, in the logarithm of sigma, below which its ends may have one number; 500 steps have such."""


@dataclass(frozen=True)
class SamplingStep:
    """Where in the schedule a model call stands."""

    noise_level: float
    """Number of the noise level at which the step starts; see `noise_level_of`."""
    sigma: float
    active: bool = True
    """Whether it lies in the part of sampling in which panels share."""


def current_step(sigma: float, sample_sigmas: Sequence[float]) -> SamplingStep:
    """The step of a schedule in which `sigma` falls.

    Found from sigma alone, never by counting calls: Heun evaluates twice a step, guidance nodes add calls. A sigma
    between two scheduled ones belongs to the step that starts at the higher. Steps are numbered by the noise level
    at which they start, not by their place in the schedule: one sampling may be spread over several samplers, and
    each of those is told its own part of the schedule alone.
    """
    starts = [scheduled for scheduled in sample_sigmas if scheduled >= sigma * (1 - 1e-4)]
    start = min(starts, default=max(sample_sigmas))
    end = max((scheduled for scheduled in sample_sigmas if scheduled < start * (1 - 1e-6)), default=0.0)
    close = end > 0 and math.log(start / end) < CLOSE
    return SamplingStep(noise_level=noise_level_of(start, finely=close), sigma=sigma)


def noise_level_of(sigma: float, *, finely: bool = False) -> float:
    """Number of a noise level: hundredths of the logarithm of `sigma`, the last digits of which depend on the device.

    Below 1e-4, the host's own stand-in for 0, all is one level. `finely`: in hundredths of these, for steps so short
    that neighbouring ones would be one level else.
    """
    hundredths = 100 * math.log(max(sigma, 1e-4))
    return round(hundredths, 2) if finely else round(hundredths)


@dataclass(frozen=True)
class StepNote:
    """APPLY_MODEL wrapper: find the step once a call; every attention layer asking would stall the GPU each time.

    Percents become noise levels here and not when the node runs: a node behind may give the model another schedule.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        """ValueError for a part of sampling that holds nothing."""
        if self.start_percent >= self.end_percent:
            raise ValueError(
                f"start_percent is {self.start_percent}; it must be below end_percent, which is {self.end_percent}."
            )

    def __call__(self, executor: Any, *call: Any, **kwargs: Any) -> Any:
        """Hands the `SamplingStep` on in transformer_options, the last argument of the call."""
        *before, transformer_options = call
        sigma = float(transformer_options["sigmas"][0])
        step = current_step(sigma, transformer_options["sample_sigmas"].tolist())
        schedule = executor.class_obj.model_sampling
        start, end = (schedule.percent_to_sigma(percent) for percent in (self.start_percent, self.end_percent))
        step = replace(step, active=start >= sigma > end)
        return executor(*before, {**transformer_options, STEP_KEY: step}, **kwargs)
