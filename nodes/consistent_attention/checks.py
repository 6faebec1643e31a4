"""What a run on a model with Consistent Self-Attention must be like, checked before its first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrappersMP

from ..host.patches import attention_patches, chain_of
from ..host.rows import RowKind
from ..host.run_checks import prepare_rows
from ..host.unet import BlockKey
from ..story.model import CONNECT_PANEL_COUNT, Story
from .patch import ConsistentSelfAttentionPatch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

CHECKS_KEY = "storydiffusion_sharing_checks"
PANEL = RowKind(
    "panel",
    f"Make both from the same story. {CONNECT_PANEL_COUNT}",
    "in the panels' order and with one for each reference in front",
)


@dataclass(frozen=True)
class SharingChecks:
    """OUTER_SAMPLE wrapper."""

    blocks: Sequence[BlockKey]
    """Those that share."""
    panels: int | None = None
    """Of the story; None without one."""
    references: Sequence[int] = ()
    """Panels that are given pictures."""

    def __call__(
        self,
        executor: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Raises ValueError for a batch of another length than the story, and for references that are noise."""
        if self.panels is not None and noise.shape[0] != self.panels:
            raise ValueError(
                f"The story given to Apply Consistent Self-Attention has {self.panels} panels, but the latent batch "
                f"has {noise.shape[0]}. {CONNECT_PANEL_COUNT}"
            )
        self._require_clean_references(noise, sigmas, denoise_mask)
        self._warn_of_replaced_blocks(executor.class_obj.model_options["transformer_options"])
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    def _require_clean_references(
        self, noise: torch.Tensor, sigmas: torch.Tensor, denoise_mask: torch.Tensor | None
    ) -> None:
        """A sampler that adds no noise was handed latents that have it, and holds the references as they then are."""
        rows = list(self.references)
        if not rows or denoise_mask is None or sigmas[0] <= 0:
            return
        if not noise[rows].any() and not denoise_mask[rows].any():
            raise ValueError(
                "Reference panels can't go from one sampler to another with leftover noise: the second one would hold "
                "them as noisy as they were handed over. Draw a story with reference panels in one KSampler."
            )

    def _warn_of_replaced_blocks(self, transformer_options: dict[str, Any]) -> None:
        """Nobody can see whether a later node's patch calls ours, so this is no error."""
        patches = attention_patches(transformer_options, "attn1")
        lost = [key for key in self.blocks if not _reaches_sharing(patches.get(key))]
        if lost:
            logging.warning(
                f"A node behind Apply Consistent Self-Attention has replaced the self-attention of {len(lost)} of its "
                f"{len(self.blocks)} UNet blocks, the first of them {lost[0]}. Panels share there only if that node "
                "calls what was there before."
            )


def check_runs(model: ModelPatcher, blocks: Sequence[BlockKey], story: Story | None) -> None:
    """Let every run of `model`, a clone on which `blocks` share, be checked before it begins."""
    panels = story.panels if story else ()
    references = [index for index, panel in enumerate(panels) if panel.is_reference]
    checks = SharingChecks(blocks, len(panels) if story else None, references)
    for check in (checks, prepare_rows(PANEL, "Apply Consistent Self-Attention")):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, CHECKS_KEY, check)


def _reaches_sharing(patch: Any) -> bool:
    return any(isinstance(link, ConsistentSelfAttentionPatch) for link in chain_of(patch))
