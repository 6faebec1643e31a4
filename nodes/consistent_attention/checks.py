"""What a run on a model with Consistent Self-Attention must be like, checked before its first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrappersMP

from ..host.attention import OVERRIDE_KEY
from ..host.patches import attention_patches, lost_places
from ..host.rows import RowKind
from ..host.run_checks import prepare_rows
from ..host.unet import Place
from ..story.model import CONNECT_PANEL_COUNT, Story
from .patch import ConsistentSelfAttentionPatch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

CHECKS_KEY = "storydiffusion_sharing_checks"
_ADVICE_FOR_PARTS = (
    " To draw some panels again, keep the whole batch (no Latent From Batch): a panel is drawn beside the others. Set "
    "Latent Noise Mask, with a black mask for each panel that shall stay, holds those."
)
PANEL = RowKind(
    "panel",
    f"Make both from the same story. {CONNECT_PANEL_COUNT}",
    "in the panels' order and with one for each reference in front",
)


@dataclass(frozen=True)
class SharingChecks:
    """OUTER_SAMPLE wrapper."""

    places: Sequence[Place]
    """Self-attentions in which panels share."""
    panels: int | None = None
    """Of the story; None without one."""
    references: Sequence[int] = ()
    """Panels that are given pictures."""
    biased: bool = False
    """Whether some keys weigh more or less than others."""

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
                f"has {noise.shape[0]}. {CONNECT_PANEL_COUNT}{_ADVICE_FOR_PARTS * (noise.shape[0] < self.panels)}"
            )
        self._require_clean_references(noise, sigmas, denoise_mask)
        transformer_options = executor.class_obj.model_options["transformer_options"]
        self._warn_of_replaced_blocks(transformer_options)
        if self.biased and OVERRIDE_KEY in transformer_options:
            logging.info(
                "Apply Consistent Self-Attention: where tokens are weighed, ComfyUI's own attention runs in the place "
                "of the one that another node has set, which may not heed weights."
            )
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
        """It is seen whether a later node's patch holds ours, but not whether it calls it, so this is no error."""
        lost = lost_places(attention_patches(transformer_options, "attn1"), self.places, _shares)
        if lost:
            blocks, of_blocks = ({place[:2] for place in places} for places in (lost, self.places))
            logging.warning(
                "A node behind Apply Consistent Self-Attention has replaced the self-attention of "
                f"{len(blocks)} of its {len(of_blocks)} UNet blocks, the first of them {lost[0][:2]}. Panels share "
                "there only if that node calls what was there before."
            )


def check_runs(model: ModelPatcher, places: Sequence[Place], story: Story | None, *, biased: bool) -> None:
    """Let every run of `model`, a clone on which panels share at `places`, be checked before it begins.

    `biased`: whether some keys weigh more or less than others.
    """
    panels = story.panels if story else ()
    references = [index for index, panel in enumerate(panels) if panel.is_reference]
    checks = SharingChecks(places, len(panels) if story else None, references, biased)
    for check in (checks, prepare_rows(PANEL, "Apply Consistent Self-Attention")):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, CHECKS_KEY, check)


def _shares(patch: Any) -> bool:
    return isinstance(patch, ConsistentSelfAttentionPatch)
