"""Apply Consistent Self-Attention in a test as a person does on the canvas, and prompts without a text encoder."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from storydiffusion.nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention


def share(model: Any, **changes: Any) -> Any:
    """Apply Consistent Self-Attention as it stands on the canvas, but for `changes`."""
    inputs = StoryApplyConsistentSelfAttention.define_schema().inputs
    defaults = {entry.id: entry.default for entry in inputs if hasattr(entry, "default") and not entry.optional}
    return StoryApplyConsistentSelfAttention.execute(model, **{**defaults, **changes}).result[0]


@cache
def embedding(prompt: int) -> torch.Tensor:
    """What a text encoder would give for prompt number `prompt`, (1, 77, 768)."""
    return torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(prompt))


def prompts(*numbers: int) -> list[Any]:
    """CONDITIONING with one row per panel."""
    return [[torch.cat([embedding(number) for number in numbers]), {}]]
