"""ControlNet hints that follow their panels, or frames, into context windows.

The host's context windows slice latents and conditioning, but not the hints: `IndexListContextHandler`'s
`prepare_control_objects` passes a control on as it is, and `broadcast_image_to` then takes the first hints of the batch
for every window. Here each window gets the hints of its own rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.controlnet
import torch

from .rows import RowKind, row_indices

MOST_COPIES = 4
"""How many times the rows of the batch the copies for windows may have together."""


def _chain(control: comfy.controlnet.ControlBase | None) -> Iterator[comfy.controlnet.ControlBase]:
    """`control` and the ControlNets applied before it."""
    while control is not None:
        control = control.control if isinstance(control, WindowedHints) else control
        yield control
        control = control.previous_controlnet


def require_matching_hints(conds: Mapping[str, Sequence[Mapping[str, Any]]], batch: int, kind: RowKind) -> None:
    """Refuse a batch of hints that has neither one picture nor one per row of the latent batch.

    The host would silently drop surplus hints and begin again with the first where some are missing.
    """
    for name, entries in conds.items():
        for control in (link for entry in entries for link in _chain(entry.get("control"))):
            hints = control.cond_hint_original.shape[0]
            if hints not in (1, batch):
                raise ValueError(
                    f"A ControlNet of the {name} conditioning has {hints} hint images, but the latent batch has "
                    f"{batch} {kind.name}s. Give it one image per {kind.name}, {kind.hint_order}, or a single image "
                    f"for all."
                )


def require_copies(control: comfy.controlnet.ControlBase) -> None:
    """Refuse hints for each row in a control whose copies would go on using the hints of the whole batch."""
    for link in _chain(control):
        # Advanced-ControlNet binds its own get_control to the instance: a copy would call that of the original.
        if link.cond_hint_original.shape[0] > 1 and "get_control" in vars(link):
            raise ValueError(
                f"A ControlNet of this run ({type(link).__name__}) can't follow its hints into context windows: the "
                f"node that made it keeps those of the whole batch. Use ComfyUI's own Apply ControlNet, a single hint, "
                f"or no windows."
            )


class WindowedHints(comfy.controlnet.ControlBase):
    """Stands in for a control during one run and asks, for each window, a copy that has this window's hints.

    The copies are shallow: they share the network, and what `pre_run` prepared, with the control itself, which stays
    as it was.
    """

    def __init__(self, control: comfy.controlnet.ControlBase, batch: int) -> None:
        """`batch`: rows of the latent batch."""
        super().__init__()
        self.control, self.batch = control, batch
        self.copies: dict[tuple[int, ...], comfy.controlnet.ControlBase] = {}

    def get_control(
        self,
        x_noisy: torch.Tensor,
        t: torch.Tensor,
        cond: Any,
        batched_number: int,
        transformer_options: dict[str, Any],
    ) -> Any:
        """The control's residuals for the rows x_noisy: (chunks * rows of the window, C, H, W)."""
        rows = tuple(row_indices(x_noisy.shape[0] // batched_number, transformer_options))
        return self._with_hints_of(rows).get_control(x_noisy, t, cond, batched_number, transformer_options)

    def _with_hints_of(self, rows: tuple[int, ...]) -> comfy.controlnet.ControlBase:
        if rows not in self.copies:
            # Windows that are the same at every step find their hints again; those that move must not fill the memory.
            while self.copies and len(rows) + sum(map(len, self.copies)) > MOST_COPIES * self.batch:
                del self.copies[next(iter(self.copies))]
            self.copies[rows] = with_hints_of(self.control, rows)
        return self.copies[rows]

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Called by the host before sampling."""
        self.control.pre_run(model, percent_to_timestep_function)

    def cleanup(self) -> None:
        """Called by the host after sampling."""
        self.copies.clear()
        self.control.cleanup()

    def get_models(self) -> list[Any]:
        """The networks that the host loads for the run."""
        return self.control.get_models()

    def inference_memory_requirements(self, dtype: torch.dtype) -> Any:
        """Bytes that the networks take besides."""
        return self.control.inference_memory_requirements(dtype)

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> Any:
        """Not tried on several GPUs, so not offered."""
        raise ValueError(
            "ControlNet hints in context windows work on one GPU only. Set window of Apply Consistent Self-Attention "
            "to 0, take Context Windows off this model, or the multi-GPU node."
        )


def with_hints_of(control: comfy.controlnet.ControlBase, rows: Sequence[int]) -> comfy.controlnet.ControlBase:
    """A copy of `control`, and of those applied before it, with the hints of `rows`; a single hint is for all."""

    def chosen(hints: torch.Tensor) -> torch.Tensor:
        return hints if hints.shape[0] == 1 else hints[list(rows)]

    part = copy.copy(control)
    part.cond_hint = None
    part.cond_hint_original = chosen(control.cond_hint_original)
    part.extra_concat_orig = [chosen(hints) for hints in control.extra_concat_orig]
    if control.previous_controlnet is not None:
        part.previous_controlnet = with_hints_of(control.previous_controlnet, rows)
    return part


def hints_by_window(conds: Mapping[str, Sequence[dict[str, Any]]], batch: int) -> None:
    """Put `WindowedHints` in the place of the controls of a run's conditioning, which is the host's own copy."""
    stand_ins: dict[comfy.controlnet.ControlBase, comfy.controlnet.ControlBase] = {}
    for entry in (entry for entries in conds.values() for entry in entries if entry.get("control") is not None):
        control = entry["control"]
        require_copies(control)
        if isinstance(control, WindowedHints):  # another of our nodes on this model was here
            continue
        # One for both halves of guidance: the host evaluates only those together that share their control.
        entry["control"] = stand_ins.setdefault(control, WindowedHints(control, batch))
