"""Attach Consistent Self-Attention to a model: which blocks share, and around whose patches."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.patcher_extension

from .attention_patch import AttentionBlock, ConsistentSelfAttentionPatch, SharingSettings, plain_attention
from .sampling_step import StepNote
from .story_text import UNNAMED_CHARACTER, Story
from .subject_maps import CrossAttentionReader, follow_subjects, guarded_panels, look_first
from .token_sharing import panels_sharing_a_character

WRAPPER_KEY = "storydiffusion_consistent_self_attention"
BLOCK_CHOICES = ["decoder", "decoder_upper_levels", "all"]


def decoder_blocks(blocks: Sequence[AttentionBlock]) -> list[AttentionBlock]:
    """The blocks after the middle one."""
    return [block for block in blocks if block.key[0] == "output"]


def choose_blocks(blocks: Sequence[AttentionBlock], choice: str) -> list[AttentionBlock]:
    """The blocks that `choice`, one of BLOCK_CHOICES, stands for."""
    if choice == "all":
        return list(blocks)
    decoder = decoder_blocks(blocks)
    if choice == "decoder":
        return decoder
    if choice == "decoder_upper_levels":
        lowest = max(block.downsampling for block in decoder)
        return [block for block in decoder if block.downsampling < lowest]
    raise ValueError(f"blocks is {choice!r}; it must be one of {', '.join(BLOCK_CHOICES)}.")


def require_unet(model: Any) -> Any:
    """The model's UNet, or an error that says what the model is instead."""
    unet = model.model.diffusion_model
    if not isinstance(unet, openaimodel.UNetModel):
        raise ValueError(
            f"Consistent Self-Attention works on UNet models (SD1.5, SDXL), but this model is a "
            f"{type(model.model).__name__} ({type(unet).__name__}). Load an SD1.5 or SDXL checkpoint."
        )
    return unet


def story_sources(story: Story) -> list[list[int]]:
    """For each panel of `story` the panels it reads from."""
    references = [index for index, panel in enumerate(story.panels) if panel.is_reference]
    return panels_sharing_a_character([panel.characters for panel in story.panels], references)


def parse_level_rates(text: str, blocks: Sequence[AttentionBlock]) -> dict[int, float]:
    """Read "2: 0.3, 4: 0.7" as {downsampling: sampling rate}; `blocks` are those that share."""
    levels = sorted({block.downsampling for block in blocks})
    rates: dict[int, float] = {}
    for part in filter(str.strip, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d*\.?\d+)\s*", part)
        if not match:
            raise ValueError(f"level_rates has {part.strip()!r}; write 'level: rate' pairs, as in '2: 0.3, 4: 0.7'.")
        level, rate = int(match[1]), float(match[2])
        if level not in levels:
            known = ", ".join(map(str, levels))
            raise ValueError(f"level_rates names level {level}, but the chosen blocks lie on the levels {known}.")
        if not 0 <= rate <= 1:
            raise ValueError(f"level_rates gives level {level} the rate {rate}; it must lie between 0 and 1.")
        if level in rates:
            raise ValueError(f"level_rates gives level {level} two rates, {rates[level]} and {rate}; keep one.")
        rates[level] = rate
    return rates


def replace_attention(
    model: Any, kind: str, blocks: Sequence[AttentionBlock], make: Callable[[AttentionBlock, Any], Any]
) -> None:
    """Set `make(block, owner)` as the patch of kind "attn1" or "attn2" of each block of `model`, a clone.

    `owner` is the patch that another node has set there, None where there is none.
    """
    owned = model.model_options["transformer_options"].get("patches_replace", {}).get(kind, {})
    replace = model.set_model_attn1_replace if kind == "attn1" else model.set_model_attn2_replace
    for block in blocks:
        # An owner by (block, number, depth) would win over one by (block, number): wrap each where it is.
        owners = {owner: patch for owner, patch in owned.items() if owner[:2] == block.key}
        for owner, patch in {block.key: None, **owners}.items():
            replace(make(block, patch), *block.key, owner[2] if len(owner) == 3 else None)


def share_tokens(
    model: Any,
    settings: SharingSettings,
    blocks: Sequence[AttentionBlock],
    *,
    guarded: bool = False,
    during: StepNote | None = None,
) -> None:
    """Attach Consistent Self-Attention to `blocks` of `model`, a clone, around what owns them already.

    `guarded`: whether subject masks will be at work; `during`: the part of sampling in which panels share, None for all
    of it.
    """

    def patch(block: AttentionBlock, owner: Any) -> ConsistentSelfAttentionPatch:
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
        if owner is not None and (guarded or settings.biased):
            raise ValueError(
                f"Another node has replaced the self-attention of UNet block {block.key}, and a replacement can't be "
                f"told to weigh tokens. Remove that node, or set strength and the weight of reference panels to 1, "
                f"share to everything and have no panel in which characters of different panels meet."
            )
        return ConsistentSelfAttentionPatch(settings, settings.rate_at(block.downsampling), *([owner] if owner else []))

    replace_attention(model, "attn1", blocks, patch)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, WRAPPER_KEY, during or StepNote())


def panels_to_guard(story: Story | None, settings: SharingSettings) -> frozenset[int]:
    """Panels in which tokens have to be told apart by character."""
    if story is None or settings.sources is None:
        if settings.subjects_only:
            raise ValueError("share is 'subjects', which needs to know the characters: connect a story.")
        return frozenset()
    guarded = guarded_panels(story, settings.sources, subjects_only=settings.subjects_only)
    if settings.subjects_only and any(UNNAMED_CHARACTER in story.panels[panel].characters for panel in guarded):
        raise ValueError(
            "share is 'subjects', but the story names no character. Write [Name] in front of its first panel, and "
            "describe [Name] in the characters field."
        )
    return guarded


def watch_subjects(model: Any, blocks: Sequence[AttentionBlock], story: Story, guarded: frozenset[int]) -> None:
    """Let `model`, a clone, note where it looks at the words of the story's characters."""
    replace_attention(model, "attn2", blocks, lambda _block, owner: CrossAttentionReader(owner or plain_attention))
    wrappers = comfy.patcher_extension.WrappersMP
    model.add_wrapper_with_key(wrappers.OUTER_SAMPLE, f"{WRAPPER_KEY}_subjects", follow_subjects(story, guarded))
    model.add_wrapper_with_key(wrappers.PREDICT_NOISE, f"{WRAPPER_KEY}_subjects", look_first)
