"""The model's own cross-attention, read for where it looks at the words of the characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..host.noise_level import STEP_KEY
from ..host.patches import ChainedPatch, attention_patches, lost_places
from ..host.rows import row_indices, rows_per_chunk
from ..host.types import LENGTHS_KEY
from ..host.unet import Place
from .maps import MAPS_KEY, SubjectMaps


@dataclass(frozen=True)
class CrossAttentionReader(ChainedPatch):
    """`attn2_replace` patch that notes where the words of the characters are looked at, and changes nothing."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        """q: (chunks * panels, N, C), k and v: (chunks * panels, T, C), projected."""
        maps: SubjectMaps | None = extra_options.get(MAPS_KEY)
        if maps is not None and maps.asked:
            require_plain_rows(q, extra_options)
            self._note(maps, q, k, extra_options)
        return self.call_previous(q, k, v, extra_options)

    def _note(self, maps: SubjectMaps, q: torch.Tensor, k: torch.Tensor, extra_options: dict[str, Any]) -> None:
        panels = row_indices(rows_per_chunk(q.shape[0], extra_options), extra_options)
        size = extra_options["activations_shape"][-2:]
        sigma = extra_options[STEP_KEY].sigma
        for chunk, uuid in enumerate(extra_options["uuids"]):
            naming = maps.naming.get(uuid)
            if naming is None:  # the negative, or a prompt that names nobody
                continue
            lengths = extra_options.get(LENGTHS_KEY, {}).get(uuid)
            for row, panel in enumerate(panels):
                positions = {name: found for name, found in naming.positions[panel].items() if found}
                if panel in maps.labelled and positions:
                    queries, keys = q[chunk * len(panels) + row], k[chunk * len(panels) + row]
                    attention = token_attention(queries, keys[: lengths and lengths[panel]], extra_options["n_heads"])
                    if lengths is None:
                        attention = attention.unflatten(1, (-1, naming.length)).sum(1)  # repeats of one prompt
                    found = {name: attention[:, at].mean(1).unflatten(0, size) for name, at in positions.items()}
                    maps.write(sigma, uuid, panel, found)


def require_plain_rows(q: torch.Tensor, extra_options: dict[str, Any]) -> None:
    """Refuse rows that another node has added for its own prompts, as attention-couple nodes do."""
    rows = extra_options["activations_shape"][0]
    if q.shape[0] != rows:
        raise ValueError(
            f"Another node on this model gives its cross-attention {q.shape[0]} rows for {rows} pictures, as nodes for "
            f"regional prompts (Attention Couple) do, so where the characters stand can't be seen. Remove it, or say "
            f"with Set Subject Masks where each character stands."
        )


def token_attention(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """Softmax attention (N, T) of queries (N, C) on keys (T, C), mean over heads, float32."""
    q, k = (tensor.float().unflatten(-1, (heads, -1)).transpose(0, 1) for tensor in (q, k))
    return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).mean(0)


def require_readers(transformer_options: dict[str, Any], places: Sequence[Place]) -> None:
    """Refuse a model on which a later node has overwritten a `CrossAttentionReader`, as IP-Adapter nodes do."""
    lost = lost_places(attention_patches(transformer_options, "attn2"), places, _reads)
    if lost:
        raise ValueError(
            f"A node behind Apply Consistent Self-Attention has replaced the model's cross-attention, as IP-Adapter "
            f"nodes do, in {len(lost)} of {len(places)} places (the first in UNet block {lost[0][:2]}), so where the "
            f"characters stand can't be seen. Connect that node before Apply Consistent Self-Attention."
        )


def _reads(patch: Any) -> bool:
    return isinstance(patch, CrossAttentionReader)
