"""Mixed precision outside the training loop, which has Accelerate's."""

from __future__ import annotations

import torch

from .config import Precision
from .stages.load_sd15 import PRECISIONS


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Compute in a config's `mixed_precision`, as training does; with "no" nothing changes."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "no")
