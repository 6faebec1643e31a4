"""Draw transitions of the toy world through the pack's own nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...devtools.toy import model as toy_model
from ...devtools.toy.animation import FRAMES, Shot, directions, film
from ...devtools.toy.captions import caption
from ...devtools.toy.palette import Array
from ...devtools.toy.pixel_vae import ENLARGED
from ...devtools.toy.scenes import SCENES
from ...devtools.toy.video_files import MOTION_WEIGHTS, SMP_WEIGHTS
from ...devtools.toy.vision import enlarge, load_vision
from ...nodes.animatediff.loader import load_motion_module
from ...nodes.animatediff.nodes import StoryApplyMotionModule
from ...nodes.animatediff.schedule import MODEL_BETAS
from ...nodes.motion_predictor.loading import LoadedSMP, load_smp
from ...nodes.motion_predictor.nodes import StorySemanticMotionPredictor
from ...nodes.motion_predictor.predict import SMPEmbeds
from ...nodes.transition_video.nodes import StorySMPVideoDecode
from ...smp.checkpoint import load_checkpoint
from ...smp.model import SMPWeights

Motion = Literal["predicted", "interpolated", "own", "blank"]
"""What every frame puts into cross-attention: what the trained predictor says; what lies on the straight line between
the panels; the true frame's own embedding, which nobody has who must predict it; or the blank tokens of unconditional
rows, which leave the motion module alone. The same projections decode all of them."""


@dataclass(frozen=True)
class Way:
    """One row of the table: how the frames between two panels come about."""

    name: str
    motion: Motion = "predicted"
    anchor: str = "hold"


@dataclass(frozen=True)
class Sampling:
    """Settings of SMP Video Decode."""

    steps: int = 20
    cfg: float = 3.0
    sampler: str = "ddim"
    scheduler: str = "ddim_uniform"


class Animator:
    """The toy world's video model, loaded by the pack's own loaders."""

    def __init__(self, sampling: Sampling, smp: Path = SMP_WEIGHTS, motion: Path = MOTION_WEIGHTS) -> None:
        self.sampling = sampling
        model, self.clip, self.vae = toy_model.load()
        # The host's default on a CPU saves memory and is slower; the result is the same to rounding.
        model.model_options["transformer_options"]["optimized_attention_override"] = toy_model.fused_attention
        self.clip_vision = load_vision()
        module = load_motion_module(str(motion))
        self.model = StoryApplyMotionModule.execute(model, module, 1.0, MODEL_BETAS).args[0]
        self.smp = {predicted: _loaded(smp, predicted=predicted) for predicted in (True, False)}

    def draw(self, shot: Shot, way: Way, seed: int) -> Array:
        """The clip between the first and the last true picture of a shot, [FRAMES, 32, 32, 3]."""
        clip = enlarge(film(shot, FRAMES))
        panels = clip[[0, -1]]
        smp = self.smp[way.motion == "predicted"]
        embeds = self._embeds(smp, panels, FRAMES)
        if way.motion == "blank":
            embeds = replace(embeds, tokens=embeds.uncond.expand_as(embeds.tokens))
        if way.motion == "own":
            steps = self._embeds(smp, clip, 2).tokens  # from each frame to the next
            embeds = replace(embeds, tokens=torch.cat([steps[:, 0], steps[-1:, 1]])[None])
        positive, negative = (self._encode(text) for text in (what_stays(shot), ""))
        frames = StorySMPVideoDecode.execute(
            model=self.model,
            smp=smp,
            smp_embeds=embeds,
            panels=panels,
            positive=positive,
            negative=negative,
            vae=self.vae,
            seed=seed,
            steps=self.sampling.steps,
            cfg=self.sampling.cfg,
            sampler_name=self.sampling.sampler,
            scheduler=self.sampling.scheduler,
            anchor=way.anchor,
            strength=1.0,
            fps=8.0,
        ).args[0]
        half = ENLARGED // 2
        drawn: Array = frames[:, half::ENLARGED, half::ENLARGED].float().cpu().numpy()
        return drawn

    def _embeds(self, smp: LoadedSMP, panels: Tensor, frames: int) -> SMPEmbeds:
        embeds: SMPEmbeds = StorySemanticMotionPredictor.execute(self.clip_vision, smp, panels, frames).args[0]
        return embeds

    def _encode(self, text: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))


def what_stays(shot: Shot) -> str:
    """A prompt that tells nothing of the movement: who, and before which background."""
    start, _ = directions(shot)
    told = replace(start, pose=None, position=None)
    return caption(SCENES[shot.scene], [told], [shot.look], np.random.default_rng(0))


def _loaded(path: Path, *, predicted: bool) -> LoadedSMP:
    def read() -> SMPWeights:
        weights = load_checkpoint(path)
        if predicted:
            return weights
        motion = {name: value for name, value in weights.motion.items() if not name.startswith("predictor.")}
        return SMPWeights(replace(weights.config, predictor=None), motion, weights.added_kv)

    with torch.inference_mode():
        return load_smp(read, path.name)
