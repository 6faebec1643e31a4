"""The official code's way to share: a dense mask over the tokens of all panels."""

from __future__ import annotations

import torch

from ...nodes.consistent_attention.token_sampling import TokenDraw


def dense_mask(tokens: int, panels: int, draws: list[TokenDraw], device: torch.device) -> torch.Tensor:
    """(panels * tokens)^2, true where a panel's query may see a key: its own tokens and the sampled ones."""
    given = torch.zeros(panels, tokens, dtype=torch.bool, device=device)
    for panel, drawn in enumerate(draws):
        given[panel, drawn.sampled.to(device)] = True
    own = torch.eye(panels, dtype=torch.bool, device=device).repeat_interleave(tokens, 1)  # (panels, B * N)
    return (own | given.flatten()).repeat_interleave(tokens, 0)
