"""Which rows of the latent batch, panels or frames, a model call holds when context windows split it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BATCH_KEY = "storydiffusion_batch"
"""Entry of transformer_options during a run: how many rows its latent batch has."""


@dataclass(frozen=True)
class RowKind:
    """What a row of the latent batch is to a node, and what to do where something has another number of them."""

    name: str
    advice: str
    hint_order: str
    """In which order ControlNet hints go."""


FRAME = RowKind("frame", "Give one for all frames, or one per frame.", "in the frames' order")


def rows_per_chunk(rows: int, transformer_options: Mapping[str, Any]) -> int:
    """How many panels or frames each prompt's chunk of a call has; `rows` counts the call's whole batch.

    A call holds one chunk per entry of `cond_or_uncond`, in any order and number, and chunks are equally long.
    """
    chunks = len(transformer_options["cond_or_uncond"])
    frames, rest = divmod(rows, chunks)
    if rest:
        raise ValueError(f"A batch of {rows} rows can't be split into {chunks} prompts of equally many frames.")
    return frames


def row_indices(frames: int, transformer_options: Mapping[str, Any]) -> list[int]:
    """Return the positions, in the whole video, of a call's frames, in the order of its rows.

    Understands the host's context windows (with the extra frame that causal_window_fix puts first) and those of
    AnimateDiff-Evolved; without either, or when a call holds the whole video, they are 0..frames-1.
    """
    window = transformer_options.get("context_window")
    ade = transformer_options.get("ad_params", {}).get("sub_idxs")
    if window is not None:
        anchor = getattr(window, "causal_anchor_index", None)
        indices = [*([anchor] if anchor is not None and anchor >= 0 else []), *window.index_list]
        # The host never clears the window: a later call that holds the whole video still finds the last one.
        if len(indices) != frames == window.total_frames:
            return list(range(frames))
    elif ade is not None:
        indices = list(ade)
    else:
        batch = transformer_options.get(BATCH_KEY, frames)
        if frames != batch:
            raise ValueError(
                f"A model call holds {frames} pictures, but the latent batch has {batch}. Another node on this model "
                "cuts the batch, or puts tiles into it (as Tiled Diffusion does), so it isn't known which is which; "
                "remove it."
            )
        return list(range(frames))
    if len(indices) != frames:
        raise ValueError(f"The context window names {len(indices)} frames, but the call holds {frames}.")
    return indices
