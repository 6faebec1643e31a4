"""A trained SMP against linear interpolation: the same decoder, the same noise, true clips to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..interpolation import interpolate_linear
from ..model import SemanticMotion
from ..training.config import Precision
from ..training.data.clips import Clip, ClipDataset, generator_at
from ..training.precision import autocast
from ..training.stages.denoiser import Denoiser
from ..training.stages.sampling import Conditioning, sample_clips
from .clip_scores import Measures, Scores, clip_scores

Path = Callable[[Tensor, Tensor, int], Tensor]
"""Start and end tokens (1, N, C) and F -> tokens of all frames (1, F, N, C)."""


@dataclass(frozen=True)
class Drawing:
    """How clips are drawn.

    Args:
        steps: DDIM steps (the paper's 50).
        cfg: guidance scale (the paper's 7.5).
        hold_ends: first and last frame are held at the true ones, as SMP Video Decode holds its panels.
        seed: of the noise.
        precision: the config's; the denoiser's frozen weights were cast to it.
    """

    steps: int = 50
    cfg: float = 7.5
    hold_ends: bool = True
    seed: int = 0
    precision: Precision = "no"


def compare_transitions(
    motion: SemanticMotion,
    denoiser: Denoiser,
    clips: ClipDataset,
    numbers: Sequence[int],
    measures: Measures,
    drawing: Drawing,
) -> dict[str, list[Scores]]:
    """Scores of every clip, drawn from its two ends along the predicted and along the straight way.

    Besides `clip_scores` (of all frames, held ones too; the end picture is the true last frame, as the decoder shows
    it): `token error`, mean
    squared error against the true tokens, and `pixel error`, mean absolute error against the true frames, both over
    the frames between the ends.

    Args:
        motion: an SMP with a predictor.
        denoiser: what it was trained with.
        clips: clips that it was not trained on.
        numbers: which of them.
        measures: the models.
        drawing: how clips are drawn.

    Returns:
        Rows by method: "SMP", "linear interpolation".
    """
    if motion.predictor is None:
        raise ValueError("This SMP has no predictor, so it is linear interpolation itself.")
    ways: dict[str, Path] = {"SMP": motion.predictor, "linear interpolation": interpolate_linear}
    rows: dict[str, list[Scores]] = {name: [] for name in ways}
    for number in tqdm(numbers, desc="clips"):
        clip = {name: value[None] for name, value in clips[number].items()}
        noise = torch.randn(clip["latents"].shape, generator=generator_at(drawing.seed, number))
        for name, way in ways.items():
            rows[name].append(_score(motion, denoiser, clip, clips.blank, way, noise, measures, drawing))
    return rows


@torch.no_grad()
def _score(
    motion: SemanticMotion,
    denoiser: Denoiser,
    clip: Clip,
    blank: Clip,
    way: Path,
    noise: Tensor,
    measures: Measures,
    drawing: Drawing,
) -> Scores:
    device = next(motion.parameters()).device
    true = {name: value.to(device) for name, value in clip.items()}
    frames = true["tokens"].shape[1]
    tokens = way(true["tokens"][:, 0], true["tokens"][:, -1], frames)
    unconditional = motion.project(blank["tokens"].to(device)).expand(1, frames, -1, -1)
    with autocast(drawing.precision, device):
        latents = sample_clips(
            denoiser,
            Conditioning(motion.project(tokens), true["text"]),
            Conditioning(unconditional, blank["text"][None].to(device)),
            noise.to(device),
            steps=drawing.steps,
            cfg=drawing.cfg,
            ends=true["latents"][:, [0, -1]] if drawing.hold_ends else None,
        )
    drawn, shown = (denoiser.to_pixels(x)[0].float().cpu() for x in (latents, true["latents"]))
    scores = clip_scores(drawn, measures, shown[-1], ends_held=drawing.hold_ends)
    between = slice(1, -1) if frames > 2 else slice(None)
    scores["token error"] = float((tokens - true["tokens"])[:, between].square().mean())
    scores["pixel error"] = float((drawn - shown)[between].abs().mean())
    return scores
