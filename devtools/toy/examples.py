"""Training examples of the toy world: noiseless latents and encoded prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import comfy.sd
import numpy as np
import torch

from .captions import caption
from .model import PIXEL_STD
from .pixel_vae import to_latent
from .world import Direction, Look, random_example, random_look, render, stage

DROPPED_PROMPTS = 0.1


@dataclass(frozen=True)
class Prompted:
    """One prompt of the pool, with what a picture of it has to show."""

    text: str
    scene: str | None
    directions: list[Direction]
    looks: list[Look]


def _prompted(rng: np.random.Generator) -> Prompted:
    scene, directions, looks, _ = random_example(rng)
    return Prompted(caption(scene, directions, looks, rng), scene, directions, looks)


class Examples:
    """A pool of prompts, encoded once, and freshly drawn pictures for them."""

    def __init__(self, clip: comfy.sd.CLIP, *, prompts: int, seed: int, device: torch.device) -> None:
        rng = np.random.default_rng([seed, 0])
        self.prompts = [_prompted(rng) for _ in range(prompts)]
        texts = ["", *(prompt.text for prompt in self.prompts)]
        # Half precision: the pool's embeddings are the largest thing that training keeps in memory.
        self.embeddings = torch.cat([encode(clip, texts[i : i + 64]) for i in range(0, len(texts), 64)]).to(device)
        self.seed = seed
        self.device = device

    def batch(self, step: int, part: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (size, 4, 32, 32) and prompt embeddings (size, 77, C): the same for the same step and part."""
        rng = np.random.default_rng([self.seed, 1 + step, part])
        chosen = rng.integers(len(self.prompts), size=size)
        images = np.stack([self._picture(self.prompts[index], rng) for index in chosen])
        rows = np.where(rng.random(size) < DROPPED_PROMPTS, 0, chosen + 1)
        pixels = torch.from_numpy(images).to(self.device).movedim(-1, 1) * 2 - 1
        return to_latent(pixels) / PIXEL_STD, self.embeddings[torch.from_numpy(rows).to(self.device)].float()

    @staticmethod
    def _picture(prompt: Prompted, rng: np.random.Generator) -> np.ndarray:
        looks = [
            _other_look(rng, direction, look) for direction, look in zip(prompt.directions, prompt.looks, strict=True)
        ]
        return render(stage(rng, prompt.scene, prompt.directions, looks))


def _other_look(rng: np.random.Generator, direction: Direction, look: Look) -> Look:
    """A look that agrees with `look` in what the prompt describes, and in nothing else but by chance."""
    described = {field: getattr(look, field) for field in direction.described}
    if "hat" in described:
        described["accent"] = look.accent  # "a red hat" tells its colour as well
    return replace(random_look(rng, direction.kind), **described)


def encode(clip: comfy.sd.CLIP, texts: list[str]) -> torch.Tensor:
    """Embeddings (len(texts), 77, C) in half precision, as the host's CLIPTextEncode gives for each alone."""
    chunks = [clip.tokenize(text)["l"] for text in texts]
    if any(len(chunk) != 1 for chunk in chunks):
        raise ValueError("A training prompt is longer than the text encoder's 77 tokens.")
    encoder = clip.load_model().model.clip_l
    encoder.set_clip_options({"execution_device": clip.patcher.load_device})
    with torch.inference_mode():
        return encoder.encode([[token for token, _ in chunk[0]] for chunk in chunks])[0].half().clone()
