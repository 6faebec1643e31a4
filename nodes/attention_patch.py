"""Consistent Self-Attention as patches and wrappers of the host's UNet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import torch

from .frame_indices import frame_indices, frames_per_call
from .sampling_step import STEP_KEY, SamplingStep
from .subject_maps import MAPS_KEY, SubjectMaps, TokenLabels
from .subject_masks import shared_key_bias
from .token_sharing import (
    Attend,
    KeyBias,
    TokenDraw,
    consistent_self_attention,
    draw_tokens,
    grid_tokens,
    sampled_token_count,
    sources_within,
)

AttentionReplacement = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
BlockKey = tuple[str, int]


@dataclass(frozen=True)
class AttentionBlock:
    """A UNet block with self-attention: its key in the host's patches and its downsampling factor."""

    key: BlockKey
    downsampling: int


@dataclass(frozen=True)
class SharingSettings:
    """What every patched block shares; when, a step says itself (`SamplingStep.active`)."""

    sampling_rate: float
    seed: int
    sources: Sequence[Sequence[int]] | None
    """For each panel the panels it reads from; None: every panel reads from all the others."""
    strength: float = 1.0
    """Weight of other panels' keys in the softmax, relative to a panel's own."""
    weights: Sequence[float] | None = None
    """For each panel what multiplies `strength` for its keys; None: nothing does."""
    level_rates: Mapping[int, float] = field(default_factory=dict)
    """Sampling rates of single levels, by their downsampling factor."""
    token_choice: str = "random"
    """random or grid."""
    subjects_only: bool = False
    """Whether background is left out of sharing."""

    def weight_of(self, panel: int) -> float:
        """Weight of a panel's keys in the softmax of others."""
        return self.strength * (self.weights[panel] if self.weights else 1)

    @property
    def biased(self) -> bool:
        """Whether some keys weigh more or less than others, so that attention needs a bias."""
        if self.strength == 0:  # nothing is shared at all
            return False
        return self.strength != 1 or any(weight != 1 for weight in self.weights or ())

    @property
    def shares(self) -> bool:
        """Whether any token is shared."""
        return self.strength > 0 and max(self.sampling_rate, *self.level_rates.values(), 0) > 0

    def rate_at(self, downsampling: int) -> float:
        """Sampling rate of the blocks at a level."""
        return self.level_rates.get(downsampling, self.sampling_rate)


def self_attention_blocks(unet: torch.nn.Module) -> list[AttentionBlock]:
    """All UNet blocks with self-attention, in the order in which the UNet runs them."""
    return list(_self_attention_blocks(unet))


def _self_attention_blocks(unet: Any) -> Iterator[AttentionBlock]:
    downsampling = 1
    stages = [
        *((("input", index), layers) for index, layers in enumerate(unet.input_blocks)),
        (("middle", 0), unet.middle_block),
        *((("output", index), layers) for index, layers in enumerate(unet.output_blocks)),
    ]
    for key, layers in stages:
        for layer in layers or []:
            if isinstance(layer, openaimodel.Downsample):
                downsampling *= 2
            elif isinstance(layer, openaimodel.Upsample):
                downsampling //= 2
            elif isinstance(layer, comfy.ldm.modules.attention.SpatialTransformer):
                yield AttentionBlock(key, downsampling)


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra_options: dict[str, Any],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The host's own attention, with the attention override that another node may have set."""
    return comfy.ldm.modules.attention.optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        mask=bias,
        attn_precision=extra_options["attn_precision"],
        transformer_options=extra_options,
    )


@dataclass(frozen=True)
class ConsistentSelfAttentionPatch:
    """`attn1_replace` patch of one block: holds settings only, so one object serves any number of runs."""

    settings: SharingSettings
    sampling_rate: float
    previous: AttentionReplacement = plain_attention

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        """q, k, v: (chunks * panels, tokens, channels), projected; returns the same shape, before `to_out`."""
        step: SamplingStep = extra_options[STEP_KEY]
        settings = self.settings
        if not step.active or settings.strength == 0 or sampled_token_count(q.shape[1], self.sampling_rate) == 0:
            return self.previous(q, k, v, extra_options)

        require_whole_panels(q, extra_options)
        panels = frame_indices(frames_per_call(q.shape[0], extra_options), extra_options)
        size = tuple(extra_options["activations_shape"][-2:])
        draws = [self._draw(size, panel, step, extra_options) for panel in panels]
        sources = sources_within(panels, settings.sources)

        maps: SubjectMaps | None = extra_options.get(MAPS_KEY)
        guarded = frozenset() if maps is None else maps.guarded
        labels = None if maps is None else maps.labels(step.sigma, size)
        if labels is None:
            # The look before the first step: nothing is known yet of who stands where.
            sources = [[] if panel in guarded else own for panel, own in zip(panels, sources, strict=True)]
        return consistent_self_attention(
            q,
            k,
            v,
            chunks=len(extra_options["cond_or_uncond"]),
            sources=sources,
            draws=draws,
            attend=self._attend(extra_options),
            key_bias=self._key_bias(panels, draws, labels, guarded, q),
        )

    def _draw(self, size: tuple[int, ...], panel: int, step: SamplingStep, extra_options: dict[str, Any]) -> TokenDraw:
        height, width = size
        if self.settings.token_choice == "grid":
            return grid_tokens(height, width, self.sampling_rate)
        block = (*extra_options["block"], extra_options["block_index"])
        draw = (self.settings.seed, step.level, block, panel)
        return draw_tokens(height * width, self.sampling_rate, draw=draw)

    def _attend(self, extra_options: dict[str, Any]) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if bias is None:
                return self.previous(q, k, v, extra_options)
            return plain_attention(q, k, v, extra_options, bias)

        return attend

    def _key_bias(
        self,
        panels: Sequence[int],
        draws: Sequence[TokenDraw],
        labels: TokenLabels | None,
        guarded: Collection[int],
        like: torch.Tensor,
    ) -> KeyBias:
        """What weakens or excludes other panels' keys; `panels` numbers the rows of this call within the story."""

        def bias(reader: int, pool: Sequence[int]) -> torch.Tensor | None:
            readable = None
            if labels is not None and panels[reader] in guarded:

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
