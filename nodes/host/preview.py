"""The host's live preview with every panel of the batch in it, where the host shows the first one alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
import latent_preview
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PREVIEW_KEY = "storydiffusion_panel_preview"

SamplingCallback = Callable[..., None]
"""What the host calls after each step: (step, denoised latents, noisy latents, total steps)."""


def grid_columns(panels: int, height: int, width: int) -> int:
    """The number of columns with which `panels` of height x width appear largest in the square the host shows."""

    def longest_side(columns: int) -> int:
        return max(columns * width, math.ceil(panels / columns) * height)

    # Of two equal ones the wider: it is read as a story is.
    return min(range(1, panels + 1), key=lambda columns: (longest_side(columns), -columns))


def panel_grid(latents: torch.Tensor, longest_side: int) -> torch.Tensor:
    """Lay the panels of a batch (B, C, H, W) out on one sheet (1, C, rows * H, columns * W), in reading order.

    A sheet whose longer side is above `longest_side` is made of panels scaled down; places left over are zero. A single
    panel stays as it is.
    """
    panels, _, height, width = latents.shape
    if panels == 1:
        return latents
    columns = grid_columns(panels, height, width)
    rows = math.ceil(panels / columns)
    scale = longest_side / max(rows * height, columns * width)
    if scale < 1:
        size = (max(1, int(height * scale)), max(1, int(width * scale)))
        latents = F.interpolate(latents, size=size, mode="area")
    latents = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, rows * columns - panels))
    return rearrange(latents, "(rows columns) c h w -> 1 c (rows h) (columns w)", rows=rows)


class PanelGridPreviewer(latent_preview.LatentPreviewer):
    """A previewer of the host, with all panels laid out before it: they are decoded at once, as one picture."""

    def __init__(self, previewer: latent_preview.LatentPreviewer) -> None:
        """`previewer`: the host's own, for one picture."""
        self.previewer = previewer

    def decode_latent_to_preview_image(
        self, preview_format: str, x0: torch.Tensor
    ) -> tuple[str, Image.Image, int | None]:
        """x0: denoised latents (B, C, H, W) of the running step; returns what the host sends to the user."""
        if x0.ndim == 4:
            x0 = panel_grid(x0, self._longest_side(x0))
        preview: tuple[str, Image.Image, int | None] = self.previewer.decode_latent_to_preview_image(preview_format, x0)
        return preview

    def _longest_side(self, x0: torch.Tensor) -> int:
        """Latent pixels that a sheet may have along its longer side, so that it costs what the host's own preview does.

        Latent2RGB gives one pixel per latent pixel, of which the host shows so many. Other previewers decode to full
        size: a sheet as large as one panel takes them no longer than that panel.
        """
        if isinstance(self.previewer, latent_preview.Latent2RGBPreviewer):
            return int(latent_preview.MAX_PREVIEW_RESOLUTION)
        return max(x0.shape[-2:])


def showing_all_panels(callback: SamplingCallback | None) -> SamplingCallback | None:
    """The same callback with all panels before its previewer; as it is if it has none, as when previews are off.

    A sampler's callback owns the progress bar, the node's identity and, for some nodes, the result besides the preview
    (`latent_preview.prepare_callback`), and all of that has to stay. So this is the host's function once more, sharing
    every variable that it closes over but the previewer; the one it was made from is not touched.
    """
    if not isinstance(callback, FunctionType):
        return callback
    cells = callback.__closure__ or ()
    shown = tuple(_with_all_panels(cell) for cell in cells)
    if all(new is old for new, old in zip(shown, cells, strict=True)):
        return callback
    again = FunctionType(callback.__code__, callback.__globals__, callback.__name__, callback.__defaults__, shown)
    again.__kwdefaults__ = callback.__kwdefaults__
    return again


def _with_all_panels(cell: CellType) -> CellType:
    try:
        previewer = cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return cell
    if isinstance(previewer, latent_preview.LatentPreviewer) and not isinstance(previewer, PanelGridPreviewer):
        return CellType(PanelGridPreviewer(previewer))
    return cell


def preview_all_panels(
    executor: Callable[..., torch.Tensor],
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    sampler: Any,
    sigmas: torch.Tensor,
    denoise_mask: torch.Tensor | None = None,
    callback: SamplingCallback | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """OUTER_SAMPLE wrapper: the sampler's live preview, if it has one, shows all panels as a contact sheet."""
    return executor(noise, latent_image, sampler, sigmas, denoise_mask, showing_all_panels(callback), *args, **kwargs)


def show_all_panels(model: ModelPatcher) -> None:
    """Let the live preview of every run of `model`, a clone, show all panels."""
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, PREVIEW_KEY, preview_all_panels)
