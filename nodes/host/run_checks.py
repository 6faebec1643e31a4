"""What a run brings along, checked before its first step: what the host would repeat, cut or skip without a word."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy.patcher_extension import WrappersMP

try:
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
except ImportError:  # another version's name must not take the pack down
    COMPILE_KEY = "torch.compile"

from .control_hints import hints_by_window, require_matching_hints
from .rows import BATCH_KEY, RowKind

# Entries of a conditioning that have a row for each row of the latent batch, or a single one for all.
ROWS = {
    "cross_attn": "rows",
    "mask": "masks",
    "concat_latent_image": "inpainted latents",
    "concat_mask": "inpainting masks",
}


def require_one_row_each(conds: Mapping[str, Sequence[Mapping[str, Any]]], batch: int, kind: RowKind) -> None:
    """Refuse conditioning that has neither one row nor one per row of the batch.

    The host would drop surplus rows and repeat missing ones.
    """
    require_matching_hints(conds, batch, kind)
    for name, entries in conds.items():
        for entry in entries:
            for key, label in ROWS.items():
                rows = entry[key].shape[0] if entry.get(key) is not None else 1
                if rows not in (1, batch):
                    raise ValueError(
                        f"The {name} conditioning has {rows} {label} (one per {kind.name}), but the latent batch has "
                        f"{batch} {kind.name}s. {kind.advice}"
                    )


def require_uncompiled(model_options: Mapping[str, Any], node: str) -> None:
    """Refuse TorchCompileModel: it lets code compiled for one UNet block run for another with other options.

    Patches are told by those options where they run, so the pictures would be others, without an error. Whether a node
    compiles in that way can't be seen any more here: torch takes the setting out of what the host keeps.
    """
    if COMPILE_KEY in model_options["transformer_options"].get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        raise ValueError(
            f"TorchCompileModel is on this model. Compiled as it does, the UNet confuses its blocks as soon as a node "
            f"has patched them, and {node} would draw something else. Remove TorchCompileModel."
        )


def prepare_rows(kind: RowKind, node: str) -> Callable[..., Any]:
    """OUTER_SAMPLE wrapper for a node on whose model each row of the latent batch is one panel or frame.

    Refuses what the host would repeat or cut, and notes for the model calls how many rows there are. Within context
    windows of any node, each row keeps its own ControlNet hint.
    """

    def prepare(executor: Any, noise: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        require_one_row_each(guider.conds, noise.shape[0], kind)
        require_uncompiled(guider.model_options, node)
        # The guider's options are this run's own copy: the host makes it, and drops it at the end.
        guider.model_options["transformer_options"][BATCH_KEY] = noise.shape[0]
        if guider.model_options.get("context_handler") is not None:
            hints_by_window(guider.conds, noise.shape[0])
        return executor(noise, *args, **kwargs)

    return prepare
