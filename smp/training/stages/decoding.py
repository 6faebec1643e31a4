"""Stage (b): predictor, added projections and motion module under the denoising loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint import save_checkpoint
from ...model import SemanticMotion
from ..config import TrainConfig
from ..data.clips import Clip
from ..pictures import frame_images
from .denoiser import Denoiser
from .sampling import Conditioning, sample_clips
from .semantic import SMP_FILE, require_predictor
from .stage import Preview, Stage, per_clip_mse


@dataclass(frozen=True)
class DecodingDraw:
    """Noise, timestep, and which conditioning of a clip is dropped."""

    drop_motion: float
    drop_text: float
    drop_both: float
    timesteps: int

    def __call__(self, clip: Clip, generator: torch.Generator) -> Clip:
        """Entries `noise` (F, c, h, w), `timesteps` (), `drop_motion` () and `drop_text` ()."""
        limits = torch.tensor([self.drop_both, self.drop_motion, self.drop_text]).cumsum(0)
        both, motion, text = torch.rand((), generator=generator) < limits  # each includes those before it
        return {
            "noise": torch.randn(clip["latents"].shape, generator=generator),
            "timesteps": torch.randint(self.timesteps, (), generator=generator),
            "drop_motion": motion,
            "drop_text": both | (text & ~motion),
        }


class DecodingStage(Stage):
    """Mean squared error of the denoiser's prediction, its motion tokens predicted from the clip's two ends.

    With `token_weight`, plus so many times the predicted tokens' own error (equation 7): to the denoising loss any
    embedding is good that draws the right frame.

    Args:
        motion: an SMP with a predictor.
        denoiser: what decodes its tokens.
        config: the rates of dropped conditioning, and how previews are drawn.
        blank: what unconditional rows see; see `ClipDataset.blank`.
    """

    fields: tuple[str, ...] = ("tokens", "latents", "text")
    blank_tokens: Tensor
    blank_text: Tensor

    def __init__(self, motion: SemanticMotion, denoiser: Denoiser, config: TrainConfig, blank: Clip) -> None:
        """Freezes resampler and projection; the denoiser has frozen what it keeps."""
        super().__init__()
        steps = denoiser.scheduler.config.num_train_timesteps
        self.draw = DecodingDraw(config.drop_motion, config.drop_text, config.drop_both, steps)
        self.motion, self.denoiser, self.config = motion, denoiser, config
        motion.requires_grad_(False)
        require_predictor(motion).requires_grad_(True)
        self.register_buffer("blank_tokens", blank["tokens"], persistent=False)
        self.register_buffer("blank_text", blank["text"], persistent=False)

    def forward(self, batch: Clip) -> Tensor:
        """Loss of each clip, (B,)."""
        return self.errors(batch)["loss"]

    def errors(self, batch: Clip) -> dict[str, Tensor]:
        """Loss of each clip and what it is made of, (B,) each."""
        path = self.path(batch["tokens"])
        added = torch.where(batch["drop_motion"][:, None, None, None], self.blank(), self.motion.project(path))

        def predict(noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
            return self.denoiser.predict(noisy, timesteps, text, added)

        denoising, tokens = self.denoise(batch, predict), per_clip_mse(path, batch["tokens"])
        return {"loss": denoising + self.config.token_weight * tokens, "denoising": denoising, "tokens": tokens}

    def denoise(self, batch: Clip, predict: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Denoising error of each clip, (B,); `predict` sees noisy frames, timesteps, text, as `Denoiser.predict`."""
        text = torch.where(batch["drop_text"][:, None, None], self.blank_text, batch["text"])
        noise, latents, timesteps = batch["noise"], batch["latents"], batch["timesteps"]
        scheduler = self.denoiser.scheduler
        noisy = scheduler.add_noise(latents, noise, timesteps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        return per_clip_mse(predict(noisy, timesteps, text), target)

    def path(self, tokens: Tensor) -> Tensor:
        """P in token space, from a clip's two ends: (B, F, N, C) -> (B, F, N, C)."""
        return self.motion.path(tokens[:, 0], tokens[:, -1], tokens.shape[1])

    def blank(self) -> Tensor:
        """The unconditional rows' P: (N', C')."""
        return self.motion.project(self.blank_tokens)

    def validate(self, batch: Clip) -> dict[str, Tensor]:
        """The same errors; a clip's draws are the same at every validation."""
        return self.errors(batch)

    def preview(self, clip: Clip) -> Preview:
        """The true clip, and the one drawn from its two ends, in noise that is always the same."""
        latents = clip["latents"][None]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self.config.seed))
        given = Conditioning(self.motion.project(self.path(clip["tokens"][None])), clip["text"][None])
        drawn = sample_clips(
            self.denoiser,
            given,
            Conditioning(self.blank().expand_as(given.tokens), self.blank_text[None]),
            noise.to(latents),
            steps=self.config.preview_steps,
            cfg=self.config.preview_cfg,
        )
        return {
            "true": frame_images(self.denoiser.to_pixels(latents)[0]),
            "drawn": frame_images(self.denoiser.to_pixels(drawn)[0]),
        }

    def export(self, folder: Path) -> None:
        """Write `smp.safetensors`, and what the denoiser trained besides."""
        save_checkpoint(folder / SMP_FILE, self.motion, self.denoiser.added_kv)
        self.denoiser.export(folder)
