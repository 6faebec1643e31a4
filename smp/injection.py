"""The added key and value projections through which P_i enters a UNet's cross-attentions (equation 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .config import CrossAttentionSite


class AddedKV(nn.Module):
    """One linear key and one linear value projection per cross-attention, without bias.

    `blocks.{i}.to_k.weight` and `blocks.{i}.to_v.weight` are [channels of site i, width].

    Args:
        sites: the UNet's cross-attentions, as data: any UNet's list will do.
        width: C, channels of the tokens P_i.
        operations: where Linear comes from: `torch.nn`, or the host's casting layers (uninitialised).
        factory: device and dtype of the weights.
    """

    def __init__(
        self, sites: Sequence[CrossAttentionSite], width: int, *, operations: Any = nn, **factory: Any
    ) -> None:
        """Zero under `torch.nn`: trained from there, decoupled guidance starts as the plain model."""
        super().__init__()
        self.sites = tuple(sites)
        self.width = width
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "to_k": operations.Linear(width, site.channels, bias=False, **factory),
                    "to_v": operations.Linear(width, site.channels, bias=False, **factory),
                }
            )
            for site in self.sites
        )
        if operations is nn:
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    def forward(self, position: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `sites[position]`: (B, N, width) -> (B, N, channels) twice."""
        block = self.blocks[position]
        return block["to_k"](tokens), block["to_v"](tokens)  # type: ignore[index]
