"""Attach Consistent Self-Attention to a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP

from ..host.noise_level import StepNote
from ..host.patches import replace_attention
from ..host.preview import show_all_panels
from ..host.unet import BlockKey, UNetBlock, blocks_with_attention
from ..story.model import UNNAMED_CHARACTER, Story
from ..subjects.run import labelled_panels, watch_subjects
from ..windows.handler import evaluate_in_windows
from .blocks import decoder_blocks, require_unet
from .checks import check_runs
from .patch import ConsistentSelfAttentionPatch
from .settings import SharingSettings

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

WRAPPER_KEY = "storydiffusion_consistent_self_attention"


def share_tokens(
    model: ModelPatcher,
    settings: SharingSettings,
    blocks: Sequence[UNetBlock],
    *,
    labelled: bool = False,
    during: StepNote | None = None,
) -> None:
    """Let the panels of a batch share tokens in `blocks` of `model`, a clone, around what owns these already.

    `labelled`: whether subject masks will be at work; `during`: the part of sampling in which panels share, None for
    all of it.
    """

    def patch(key: BlockKey, owner: Any) -> ConsistentSelfAttentionPatch:
        if isinstance(owner, ConsistentSelfAttentionPatch):
            raise ValueError(
                "This model has Consistent Self-Attention already. Remove one of the two Apply Consistent "
                "Self-Attention nodes, or connect this one to the model from before the other."
            )
        if getattr(owner, "__module__", None) == "comfy_extras.nodes_sag":
            raise ValueError(
                "Self-Attention Guidance comes before Apply Consistent Self-Attention on this model, and would take "
                "the keys that panels share for a panel's own. Connect it behind, or set blocks to decoder."
            )
        if owner is not None and (labelled or settings.biased):
            raise ValueError(
                f"Another node has replaced the self-attention of UNet block {key}, and a replacement can't be "
                f"told to weigh tokens. Remove that node, or set strength and the weight of reference panels to 1, "
                f"share to everything and have no panel in which characters of different panels meet."
            )
        return ConsistentSelfAttentionPatch(settings, rates[key], previous=owner)

    rates = {block.key: settings.rate_at(block.downsampling) for block in blocks}
    replace_attention(model, "attn1", rates, patch)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, during or StepNote())


def attach_sharing(
    model: ModelPatcher,
    settings: SharingSettings,
    blocks: Sequence[UNetBlock],
    story: Story | None,
    *,
    window: int,
    during: StepNote,
) -> ModelPatcher:
    """A clone of `model` on which the panels of a batch look alike: all that Apply Consistent Self-Attention does.

    Args:
        model: of a UNet.
        settings: what is shared.
        blocks: UNet blocks in which panels share.
        story: who stands in which panel; None: all panels share.
        window: panels that the model sees at once; 0: all.
        during: the part of sampling in which panels share.

    Raises:
        ValueError: a story, a window or patches of other nodes with which that can't be.
    """
    if window == 1 and story is None:
        raise ValueError("window is 1, in which no panel sees another; it must be 0 (no windows), or 2 or more.")
    labelled = panels_to_label(story, settings)
    model = model.clone()
    places = [place for block in blocks for place in block.places]
    check_runs(model, places, story, biased=settings.biased or bool(labelled))
    share_tokens(model, settings, blocks, labelled=bool(labelled), during=during)
    if story and labelled and settings.shares:
        seen = decoder_blocks(blocks_with_attention(require_unet(model)))
        watch_subjects(model, seen, story, labelled)
    if window:
        evaluate_in_windows(model, window, [panel.characters for panel in story.panels] if story else None)
    show_all_panels(model)
    return model


def panels_to_label(story: Story | None, settings: SharingSettings) -> frozenset[int]:
    """Panels in which tokens have to be told apart by character."""
    if story is None or settings.sources is None:
        if settings.subjects_only:
            raise ValueError("share is 'subjects', which needs to know the characters: connect a story.")
        return frozenset()
    labelled = labelled_panels(story, settings.sources, subjects_only=settings.subjects_only)
    if settings.subjects_only and any(UNNAMED_CHARACTER in story.panels[panel].characters for panel in labelled):
        raise ValueError(
            "share is 'subjects', but the story names no character. Write [Name] in front of its first panel, and "
            "describe [Name] in the characters field."
        )
    return labelled
