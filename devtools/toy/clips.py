"""Clips of the toy world as SMP training reads them, drawn when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import comfy.sd
import numpy as np
import torch
from torch import Tensor

from ...smp.training.data.clips import Clip
from .animation import Shot, directions, film, moment, picture_of, random_shot, stances_of
from .captions import caption
from .examples import encode
from .figure import Kind
from .model import PIXEL_STD
from .palette import Array
from .pixel_vae import to_latent
from .scenes import SCENES
from .vision import EMBED_WIDTH, encode_pictures
from .world import random_look

Split = Literal["training", "held out"]
HELD_OUT_SHARE = 8
"""One way between named stances in so many is never trained on, in neither direction."""


@dataclass(frozen=True)
class Take:
    """A shot, and the prompt that goes with it."""

    shot: Shot
    text: str


def is_held_out(shot: Shot) -> bool:
    """Whether this way between a pose at a position and a pose at a position is kept from training."""
    ends = sorted(" ".join(stance) for stance in stances_of(shot))
    digest = hashlib.sha256("|".join(ends).encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def take(split: Split, number: int, seed: int) -> Take:
    """Number `number` of the split: the same on every machine."""
    rng = np.random.default_rng([seed, int(split == "held out"), number])
    while True:
        shot = random_shot(rng, random_look(rng, Kind(int(rng.integers(2)))))
        if is_held_out(shot) == (split == "held out"):
            return Take(shot, _text(shot, rng))


def _text(shot: Shot, rng: np.random.Generator) -> str:
    """A prompt of the clip: in half of them of what stays, else of its start or its end alone."""
    fields = ["hat"] if shot.look.hat else []
    fields += ["hair", "top", "accent"] + (["trousers"] if shot.look.kind == Kind.MAN else [])
    described = rng.permutation(fields)[: int(rng.choice(3, p=[0.5, 0.3, 0.2]))]
    start, end = directions(shot, [str(field) for field in described])
    told = (replace(start, pose=None, position=None), start, end)[int(rng.choice(3, p=[0.5, 0.25, 0.25]))]
    return caption(SCENES[shot.scene], [told], [shot.look], rng)


def latents_of(pictures: Array) -> Tensor:
    """Pictures (F, 32, 32, 3), 0 to 1, as the toy model's latents (F, 4, 32, 32)."""
    return to_latent(torch.from_numpy(pictures).movedim(-1, 1) * 2 - 1) / PIXEL_STD


class ToyClips:
    """Clips of the split, or, with `frames` = 1, single pictures out of them; a `ClipDataset`.

    Args:
        split: training, or the ways that are kept from it.
        count: how many there are.
        frames: F.
        clip: encodes prompts.
        clip_vision: encodes frames; None where nobody reads tokens.
        seed: of all of them.
    """

    def __init__(
        self,
        split: Split,
        count: int,
        frames: int,
        *,
        clip: comfy.sd.CLIP | None,
        clip_vision: Any,
        seed: int = 0,
    ) -> None:
        self.split, self.count, self.frames, self.seed = split, count, frames, seed
        self.clip, self.clip_vision = clip, clip_vision

    @property
    def shard_sizes(self) -> Sequence[int]:
        """One shard."""
        return [self.count]

    def __len__(self) -> int:
        return self.count

    @cached_property
    def blank(self) -> Clip:
        """What unconditional rows see: no tokens, the empty prompt."""
        text = {"text": self._encode("")} if self.clip else {}
        return {"tokens": torch.zeros(1, EMBED_WIDTH), **text}

    @torch.no_grad()
    def __getitem__(self, number: int) -> Clip:
        if not 0 <= number < self.count:
            raise IndexError(f"There is no clip {number}; there are {self.count}.")
        chosen = take(self.split, number, self.seed)
        pictures = self.pictures(chosen.shot, number)
        entries = {"latents": latents_of(pictures)}
        if self.clip:
            entries["text"] = self._encode(chosen.text)
        if self.clip_vision:
            entries["tokens"] = encode_pictures(self.clip_vision, pictures)[1].cpu()[:, None]
        return entries

    def pictures(self, shot: Shot, number: int) -> Array:
        """The frames of a shot, [F, 32, 32, 3]."""
        if self.frames > 1:
            return film(shot, self.frames)
        time = float(np.random.default_rng([self.seed, 2, number]).random())
        return picture_of(shot, moment(shot, time))[None]

    def _encode(self, text: str) -> Tensor:
        assert self.clip is not None
        return encode(self.clip, [text])[0].float()
