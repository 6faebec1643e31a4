"""Consistent Self-Attention as a patch of the host's UNet blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..host.attention import plain_attention
from ..host.noise_level import STEP_KEY, SamplingStep
from ..host.patches import ChainedPatch
from ..host.rows import row_indices, rows_per_chunk
from ..host.types import Attend
from ..subjects.maps import MAPS_KEY, SubjectMaps, TokenLabels
from .attention import KeyBias, consistent_self_attention
from .key_bias import shared_key_bias
from .settings import SharingSettings
from .sources import sources_within
from .token_sampling import TokenDraw, draw_tokens, grid_tokens, sampled_token_count


@dataclass(frozen=True)
class ConsistentSelfAttentionPatch(ChainedPatch):
    """`attn1_replace` patch of one block: holds settings only, so one object serves any number of runs."""

    settings: SharingSettings
    sampling_rate: float

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        """q, k, v: (chunks * panels, tokens, channels), projected; returns the same shape, before `to_out`."""
        step: SamplingStep = extra_options[STEP_KEY]
        settings = self.settings
        if not step.active or settings.strength == 0 or sampled_token_count(q.shape[1], self.sampling_rate) == 0:
            return self.call_previous(q, k, v, extra_options)

        require_whole_panels(q, extra_options)
        panels = row_indices(rows_per_chunk(q.shape[0], extra_options), extra_options)
        size = tuple(extra_options["activations_shape"][-2:])
        draws = [self._draw(size, panel, step, extra_options) for panel in panels]
        sources = sources_within(panels, settings.sources)

        maps: SubjectMaps | None = extra_options.get(MAPS_KEY)
        labelled = frozenset() if maps is None else maps.labelled
        labels = None if maps is None else maps.labels(step.sigma, size, q.device)
        if labels is None:
            # The look before the first step: nothing is known yet of who stands where.
            sources = [[] if panel in labelled else own for panel, own in zip(panels, sources, strict=True)]
        return consistent_self_attention(
            q,
            k,
            v,
            chunks=len(extra_options["cond_or_uncond"]),
            sources=sources,
            draws=draws,
            attend=self._attend(extra_options),
            key_bias=self._key_bias(panels, draws, labels, labelled, q),
        )

    def _draw(self, size: tuple[int, ...], panel: int, step: SamplingStep, extra_options: dict[str, Any]) -> TokenDraw:
        height, width = size
        if self.settings.token_choice == "grid":
            return grid_tokens(height, width, self.sampling_rate)
        block = (*extra_options["block"], extra_options["block_index"])
        draw = (self.settings.seed, step.noise_level, block, panel)
        return draw_tokens(height * width, self.sampling_rate, draw=draw)

    def _attend(self, extra_options: dict[str, Any]) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if bias is None:
                return self.call_previous(q, k, v, extra_options)
            return plain_attention(q, k, v, extra_options, bias)

        return attend

    def _key_bias(
        self,
        panels: Sequence[int],
        draws: Sequence[TokenDraw],
        labels: TokenLabels | None,
        labelled: Collection[int],
        like: torch.Tensor,
    ) -> KeyBias:
        """What weakens or excludes other panels' keys; `panels` numbers the rows of this call within the story."""

        def bias(reader: int, pool: Sequence[int]) -> torch.Tensor | None:
            readable = None
            if labels is not None and panels[reader] in labelled:

                def readable(source: int) -> torch.Tensor:
                    return labels.may_read(
                        panels[reader],
                        panels[source],
                        draws[source].sampled,
                        subjects_only=self.settings.subjects_only,
                    )

            return shared_key_bias(
                reader,
                pool,
                shared=len(draws[reader].sampled),
                own=len(draws[reader].rest),
                weights=[self.settings.weight_of(panels[source]) for source in pool],
                readable=readable,
                like=like,
            )

        return bias


def require_whole_panels(q: torch.Tensor, extra_options: dict[str, Any]) -> None:
    """Refuse what cuts panels into tiles or merges their tokens before attention, as HyperTile and ToMe do."""
    rows, _, height, width = extra_options["activations_shape"]
    if tuple(q.shape[:2]) != (rows, height * width):
        raise ValueError(
            f"Consistent Self-Attention needs every panel's tokens whole: UNet block {extra_options['block']} "
            f"holds {rows} panels of {height * width} tokens, but its attention was handed {q.shape[0]} rows of "
            f"{q.shape[1]}. Another node on this model tiles or merges tokens (HyperTile, Token Merging); remove it."
        )
