"""The one interface through which training sees a video denoiser."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from diffusers import DDPMScheduler
from torch import Tensor, nn

from ...injection import AddedKV


class Denoiser(nn.Module):
    """A video diffusion model whose cross-attentions also read motion tokens, through added projections.

    A subclass puts `added_kv` to use in `predict` (equation 6, or decoupled), freezes what stays as it is
    (`requires_grad_(False)`), and leaves the rest to be trained: always `added_kv`, often a motion module.

    Args:
        added_kv: the added key and value projections.
        scheduler: the noise schedule and what is predicted (`prediction_type` "epsilon" or "v_prediction").

    Raises:
        ValueError: another kind of prediction.
    """

    def __init__(self, added_kv: AddedKV, scheduler: DDPMScheduler) -> None:
        """Nothing is copied."""
        super().__init__()
        self.added_kv, self.scheduler = added_kv, scheduler
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"The denoiser predicts {scheduler.config.prediction_type!r}; it must be 'epsilon' or 'v_prediction'."
            )

    @abstractmethod
    def predict(self, noisy_frames: Tensor, timesteps: Tensor, text: Tensor, added_tokens: Tensor) -> Tensor:
        """Noise or velocity of every frame.

        Args:
            noisy_frames: (B, F, c, h, w) latents.
            timesteps: (B,) of the scheduler, one for all frames of a clip.
            text: (B, T, D) text tokens.
            added_tokens: (B, F, N', C'), frame i's P_i.

        Returns:
            (B, F, c, h, w).
        """

    @abstractmethod
    def to_pixels(self, latents: Tensor) -> Tensor:
        """(B, F, c, h, w) latents -> (B, F, H, W, 3) in [0, 1], to look at and to measure."""

    def export(self, folder: Path) -> None:
        """Write what was trained besides `added_kv`, whole or not at all."""
