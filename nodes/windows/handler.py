"""Panel windows as a context handler of the host: the UNet itself is evaluated window by window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import comfy.context_windows
import comfy.patcher_extension
import torch

from .plan import PanelWindow, plan_windows

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

WRAPPER_KEY = "storydiffusion_panel_windows"


class PanelWindowHandler(comfy.context_windows.IndexListContextHandler):
    """The host's windowing over the batch (slicing of latents and conditioning, memory), with our plan of windows."""

    def __init__(self, window: int, casts: Sequence[Sequence[str]] | None) -> None:
        """`window`: panels per window; `casts`: characters of each panel, None for one character throughout."""
        super().__init__(
            context_schedule=comfy.context_windows.ContextSchedule("story panels", self._plan),
            fuse_method=comfy.context_windows.ContextFuseMethod(comfy.context_windows.ContextFuseMethods.FLAT, None),
            context_length=window,
            dim=0,
            causal_window_fix=False,
        )
        self.casts = casts

    def _plan(self, panels: int) -> list[PanelWindow]:
        return plan_windows(self.casts or [("",)] * panels, self.context_length)

    def should_use_context(
        self, model: Any, conds: Any, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
    ) -> bool:
        """Whether the batch is larger than a window."""
        return x_in.shape[0] > self.context_length

    def get_context_windows(self, model: Any, x_in: torch.Tensor, model_options: dict[str, Any]) -> list[Any]:
        """The host's window objects, in the order of the plan."""
        panels = x_in.shape[0]
        return [
            comfy.context_windows.IndexListContextWindow(list(window.panels), dim=0, total_frames=panels)
            for window in self._plan(panels)
        ]

    def combine_context_window_results(
        self,
        x_in: torch.Tensor,
        sub_conds_out: Sequence[torch.Tensor],
        sub_conds: Any,
        window: Any,
        window_idx: int,
        total_windows: int,
        timestep: torch.Tensor,
        conds_final: Sequence[torch.Tensor],
        counts_final: Sequence[torch.Tensor],
        biases_final: Any,
    ) -> None:
        """Take each panel from the window that owns it; anchors that a window only reads are dropped."""
        owned = list(self._plan(x_in.shape[0])[window_idx].owned)
        rows = [window.index_list.index(panel) for panel in owned]
        for result, total, count in zip(sub_conds_out, conds_final, counts_final, strict=True):
            total[owned] = result[rows]
            count[owned] = 1


def evaluate_in_windows(model: ModelPatcher, window: int, casts: Sequence[Sequence[str]] | None) -> None:
    """Attach windows of `window` panels to `model`, a clone; memory is then estimated for one window."""
    if model.model_options.get("context_handler") is not None:
        raise ValueError(
            f"window is {window}, but this model already has context windows from another node. Remove that node, or "
            f"set window to 0 and let it cut the batch."
        )
    if casts:
        plan_windows(casts, window)  # refuses a window too small for a panel before any sampling starts
    model.model_options["context_handler"] = PanelWindowHandler(window, casts)
    comfy.context_windows.create_prepare_sampling_wrapper(model)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, require_own_windows)


def require_own_windows(executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper that refuses what can't be together with windows.

    Raises:
        ValueError: context windows which a later node put in the place of ours; EasyCache and LazyCache, which know a
            model call by its prompt, and would give one window what they kept of another.
    """
    model_options = executor.class_obj.model_options
    handler = model_options.get("context_handler")
    panels = noise.shape[0]
    windowed = isinstance(handler, PanelWindowHandler) and panels > handler.context_length
    if windowed and "easycache" in model_options["transformer_options"]:
        raise ValueError(
            f"EasyCache (or LazyCache) is on this model, and would mix up the windows in which Apply Consistent "
            f"Self-Attention draws {panels} panels. Remove it, or set window to 0."
        )
    if not isinstance(handler, PanelWindowHandler):
        raise ValueError(
            "Context Windows behind Apply Consistent Self-Attention have taken the place of its window. Remove that "
            "node, or set window to 0 and let it cut the batch."
        )
    return executor(noise, *args, **kwargs)
