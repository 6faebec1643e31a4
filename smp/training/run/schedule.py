"""Numbers that follow from the iteration alone."""

from __future__ import annotations

import math

from ..config import TrainConfig


def get_lr(config: TrainConfig, step: int) -> float:
    """Learning rate of iteration `step` (from 0): linear warm-up, then constant or half a cosine down to zero."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup) / max(1, config.iterations - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def get_ema_decay(config: TrainConfig, step: int) -> float:
    """Share of the average kept at iteration `step` (from 0): small at first, so that no start weights linger."""
    return min(config.ema, (1 + step) / (10 + step))
