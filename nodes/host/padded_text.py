"""Prompts of different length in one batch: cross-attention leaves out the zeros behind the shorter ones.

The conditioning brings what that takes along, as a hook that the host hands to the run of any sampler on any model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.hooks
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .attention import plain_attention
from .patches import ChainedPatch, attention_patches, owners_of
from .rows import row_indices, rows_per_chunk
from .text_rows import repeat_rows_to_one_length
from .types import LENGTHS_KEY, Conditioning
from .unet import blocks_with_attention, unet_of

MOST_FOR_CONTROLNET = 8
"""How many times as long as the longest prompt a ControlNet's text may become."""
HOOK_KEY = "storydiffusion_padded_text"


def leave_out_padding(*conditionings: Conditioning) -> None:
    """Let every run on these leave out the zeros that `LENGTHS_KEY` tells of.

    All of a run's conditionings get the same hook: the host evaluates only those together that share their hooks.
    """
    hook = comfy.hooks.TransformerOptionsHook(
        {"wrappers": {WrappersMP.OUTER_SAMPLE: {HOOK_KEY: [attend_to_text_only]}}}
    )
    hooks = comfy.hooks.HookGroup()
    hooks.add(hook)
    for conditioning in conditionings:
        for _, options in conditioning:
            options["hooks"] = hooks


def attend_to_text_only(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper.

    Raises:
        ValueError: what can't leave the padding out: a model that is no UNet, a ControlNet for which the text would be
            too long, text that another node has put behind the padding, another number of rows.
    """
    guider = executor.class_obj
    entries = [entry for conds in guider.conds.values() for entry in conds if LENGTHS_KEY in entry]
    if not isinstance(unet_of(guider.model_patcher), UNetModel):
        raise ValueError(
            f"{_unequal(entries)} Only UNet models (SD1.5, SDXL) can be drawn so. Make them of one length."
        )
    for entry in entries:
        if entry["cross_attn"].shape[1] != max(entry[LENGTHS_KEY]):
            raise ValueError(
                f"{_unequal(entries)} Another node (Conditioning Concat) has put text behind them. Use prefix and "
                f"suffix of Encode Story Prompts, or make the prompts of one length."
            )
        if len(entry[LENGTHS_KEY]) != noise.shape[0]:
            raise ValueError(
                f"{_unequal(entries)} There are {len(entry[LENGTHS_KEY])} of them, but the latent batch has "
                f"{noise.shape[0]} rows. Give it a row for each."
            )
    for entry in (entry for entry in entries if entry.get("control") is not None):
        entry["cross_attn_controlnet"] = _for_controlnet(entry)
    # The guider's options are this run's own copy: the host makes it, and drops it at the end.
    options = guider.model_options["transformer_options"]
    options[LENGTHS_KEY] = {entry["uuid"]: entry[LENGTHS_KEY] for entry in entries}
    patches = attention_patches(options, "attn2")
    ours = {
        place: UnpaddedCrossAttention(previous=owner)
        for block in blocks_with_attention(unet_of(guider.model_patcher))
        for place, owner in owners_of(patches, block.key).items()
    }
    replaced = {**options.get("patches_replace", {}), "attn2": {**patches, **ours}}
    options["patches_replace"] = replaced
    return executor(noise, *args, **kwargs)


def _for_controlnet(entry: Mapping[str, Any]) -> Tensor:
    """(B, T, C): the text that a ControlNet sees, whose own attention no patch reaches: rows repeated to one length."""
    lengths = entry[LENGTHS_KEY]
    if math.lcm(*lengths) > MOST_FOR_CONTROLNET * max(lengths):
        raise ValueError(f"{_unequal([entry])} A ControlNet can't be used with that. Make their lengths more alike.")
    return repeat_rows_to_one_length(
        [entry["cross_attn"][row : row + 1, :length] for row, length in enumerate(lengths)]
    )


def _unequal(entries: Sequence[Mapping[str, Any]]) -> str:
    lengths = sorted({length for entry in entries for length in entry[LENGTHS_KEY]})
    return f"The panels' prompts are of very different length ({', '.join(map(str, lengths))} tokens)."


def text_lengths(rows: int, extra_options: Mapping[str, Any]) -> list[int | None]:
    """For each of a call's `rows` how many of its keys are text; None: all."""
    known = extra_options.get(LENGTHS_KEY, {})
    panels = row_indices(rows_per_chunk(rows, extra_options), extra_options)
    return [known[uuid][panel] if uuid in known else None for uuid in extra_options["uuids"] for panel in panels]


@dataclass(frozen=True)
class UnpaddedCrossAttention(ChainedPatch):
    """`attn2_replace` patch: rows of one text length attend together, to their text alone.

    What another patch adds to attention to the text is kept: added to plain attention that is that patch's own result.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """q (B, N, C), k and v (B, T, C), projected; returns (B, N, C), before `to_out`."""
        rows_of: dict[int | None, list[int]] = {}
        for row, length in enumerate(text_lengths(q.shape[0], extra_options)):
            rows_of.setdefault(length, []).append(row)
        out = torch.empty_like(q)
        for length, rows in rows_of.items():
            out[rows] = plain_attention(q[rows], k[rows, :length], v[rows, :length], extra_options)
        if self.previous is None:
            return out
        return out + (self.previous(q, k, v, extra_options) - plain_attention(q, k, v, extra_options))
