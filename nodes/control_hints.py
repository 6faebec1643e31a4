"""ControlNet hints that follow their panels into windows.

The host's context windows slice latents and conditioning, but not the hints: `IndexListContextHandler`'s
`prepare_control_objects` passes a control on as it is, and `broadcast_image_to` then takes the first hints of the batch
for every window. Here each window gets the hints of its own panels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.controlnet
import torch


def _chain(control: comfy.controlnet.ControlBase | None) -> Iterator[comfy.controlnet.ControlBase]:
    """`control` and the ControlNets applied before it."""
    while control is not None:
        yield control
        control = control.previous_controlnet


def require_matching_hints(conds: Mapping[str, Sequence[Mapping[str, Any]]], panels: int) -> None:
    """Refuse a batch of hints that has neither one picture nor one per panel.

    The host would silently drop surplus hints and begin again with the first where some are missing.
    """
    for name, entries in conds.items():
        for control in (link for entry in entries for link in _chain(entry.get("control"))):
            hints = control.cond_hint_original.shape[0]
            if hints not in (1, panels):
                raise ValueError(
                    f"A ControlNet of the {name} conditioning has {hints} hint images, but the latent batch has "
                    f"{panels} panels. Give it one image per panel, in the panels' order and with one for each "
                    f"reference in front, or a single image for all."
                )


class WindowedHints(comfy.controlnet.ControlBase):
    """Stands in for a control during one run and asks, for each window, a copy that has this window's hints.

    The copies are shallow: they share the network, and what `pre_run` prepared, with the control itself, which stays
    as it was.
    """

    def __init__(self, control: comfy.controlnet.ControlBase) -> None:
        super().__init__()
        self.control = control
        self.by_panels: dict[tuple[int, ...], comfy.controlnet.ControlBase] = {}

    def get_control(
        self,
        x_noisy: torch.Tensor,
        t: torch.Tensor,
        cond: Any,
        batched_number: int,
        transformer_options: dict[str, Any],
    ) -> Any:
        """The control's residuals for the rows x_noisy: (chunks * panels of the window, C, H, W)."""
        window = transformer_options.get("context_window")
        control = self.control if window is None else self._of_panels(tuple(window.index_list))
        return control.get_control(x_noisy, t, cond, batched_number, transformer_options)

    def _of_panels(self, panels: tuple[int, ...]) -> comfy.controlnet.ControlBase:
        if panels not in self.by_panels:
            self.by_panels[panels] = with_hints_of(self.control, panels)
        return self.by_panels[panels]

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Called by the host before sampling."""
        self.control.pre_run(model, percent_to_timestep_function)

    def cleanup(self) -> None:
        """Called by the host after sampling."""
        self.by_panels.clear()
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
            "ControlNet hints in panel windows work on one GPU only. Set window of Apply Consistent Self-Attention to "
            "0, or take the multi-GPU node off this model."
        )


def with_hints_of(control: comfy.controlnet.ControlBase, panels: Sequence[int]) -> comfy.controlnet.ControlBase:
    """A copy of `control`, and of those applied before it, with the hints of `panels`; a single hint is for all."""

    def rows(hints: torch.Tensor) -> torch.Tensor:
        return hints if hints.shape[0] == 1 else hints[list(panels)]

    part = copy.copy(control)
    part.cond_hint = None
    part.cond_hint_original = rows(control.cond_hint_original)
    part.extra_concat_orig = [rows(hints) for hints in control.extra_concat_orig]
    if control.previous_controlnet is not None:
        part.previous_controlnet = with_hints_of(control.previous_controlnet, panels)
    return part


def hints_by_window(executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper: the run's conditioning, the host's own copy, gets `WindowedHints` for its controls."""
    conds = executor.class_obj.conds
    stand_ins: dict[comfy.controlnet.ControlBase, WindowedHints] = {}
    for entry in (entry for entries in conds.values() for entry in entries if entry.get("control") is not None):
        control = entry["control"]
        # One for both halves of guidance: the host evaluates only those together that share their control.
        entry["control"] = stand_ins.setdefault(control, WindowedHints(control))
    return executor(noise, *args, **kwargs)
