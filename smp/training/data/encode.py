"""Clips to what training reads: tokens, and for the decoding stage latents and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...encoder import EncodedImages, OpenCLIPEncoder
from ...model import SemanticMotion
from ..config import Precision, TrainConfig
from ..digest import weights_digest
from ..precision import autocast
from ..stages.load_sd15 import load_vae
from .clips import Clip
from .videos import RawClip


def encoding_precision(config: TrainConfig, device: torch.device) -> Precision:
    """The config's on a GPU, which is many times faster in it; clips are stored in 16 bits anyway. A CPU is slower."""
    return config.mixed_precision if device.type == "cuda" else "no"


class TokenEncoder:
    """Frames to tokens of an SMP's space, as the nodes make them.

    Args:
        encoder: the image encoder.
        motion: the SMP whose space it is; its resampler is used as it is.
        device: where it runs.
        precision: what it computes in; see `encoding_precision`.
    """

    def __init__(
        self, encoder: OpenCLIPEncoder, motion: SemanticMotion, device: torch.device, precision: Precision = "no"
    ) -> None:
        """Moves both to the device."""
        self.encoder, self.motion, self.device = encoder.to(device).eval(), motion.to(device).eval(), device
        self.precision = precision

    @torch.no_grad()
    def encode(self, clip: RawClip) -> Clip:
        """`tokens` (F, N, C)."""
        with autocast(self.precision, self.device):
            return {"tokens": self._tokens(self.encoder(clip.frames.to(self.device)))}

    @torch.no_grad()
    def blank(self) -> Clip:
        """What unconditional rows see: `tokens` (N, C)."""
        if self.motion.config.uncond == "zero":
            return {"tokens": torch.zeros(self.motion.config.token_shape)}
        size = self.encoder.size
        pixels = torch.zeros(1, 3, size, size, device=self.device)
        with autocast(self.precision, self.device):
            return {"tokens": self._tokens(self.encoder.encode_pixels(pixels))[0].cpu()}

    def weights(self) -> dict[str, str]:
        """A digest of the encoder; what `token_space` says of the SMP is kept beside it."""
        return {"image_encoder": weights_digest(self.encoder.state_dict())}

    def _tokens(self, encoded: EncodedImages) -> Tensor:
        space = self.motion.config.token_space
        return self.motion.tokens(encoded.image_embeds if space == "image_embeds" else encoded.hidden_states)


class SD15Encoder:
    """Frames to SD1.5's latents and captions to its text tokens.

    Args:
        folder: SD1.5 in diffusers' layout (vae/, text_encoder/, tokenizer/).
        device: where it runs.
        precision: what it computes in; see `encoding_precision`.

    Raises:
        ValueError: a part is missing.
    """

    def __init__(self, folder: Path, device: torch.device, precision: Precision = "no") -> None:
        """Loads the three parts from local files."""
        from transformers import CLIPTextModel, CLIPTokenizer

        for part in ("text_encoder", "tokenizer"):
            if not (folder / part).is_dir():
                raise ValueError(f"There is no {part}/ in {folder}; it must be SD1.5 in diffusers' layout.")
        self.device, self.precision, self.vae = device, precision, load_vae(folder).to(device)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        text: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
        self.text = text.to(device).eval()

    @torch.no_grad()
    def encode(self, clip: RawClip) -> Clip:
        """`latents` (F, 4, size/8, size/8) and `text` (77, 768).

        Latents are the mean of the VAE's distribution: its spread is far below the noise that training adds.
        """
        pixels = clip.frames.to(self.device).movedim(-1, 1) * 2 - 1
        with autocast(self.precision, self.device):
            latents = self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor
        return {"latents": latents, "text": self.encode_text(clip.caption)}

    @torch.no_grad()
    def encode_text(self, caption: str) -> Tensor:
        """(77, 768); a longer caption is cut at 77 tokens, as SD1.5 was trained."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(caption, max_length=self.tokenizer.model_max_length, **options).input_ids
        with autocast(self.precision, self.device):
            return self.text(ids.to(self.device))[0][0]

    def blank(self) -> Clip:
        """`text` of the empty caption."""
        return {"text": self.encode_text("").cpu()}

    def weights(self) -> dict[str, str]:
        """Digests of VAE and text encoder."""
        parts = {"vae": self.vae, "text_encoder": self.text}
        return {name: weights_digest(part.state_dict()) for name, part in parts.items()}


class ClipEncoder(Protocol):
    """One of the above."""

    def encode(self, clip: RawClip, /) -> Clip: ...  # noqa: D102

    def blank(self) -> Clip: ...  # noqa: D102

    def weights(self) -> dict[str, str]: ...  # noqa: D102
