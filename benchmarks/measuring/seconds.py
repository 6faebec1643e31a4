"""Wall time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Wall time of one call, kernels finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
