"""Train the toy world's video: motion module, added projections, predictor, and all of them together.

python devtools/launch.py storydiffusion.devtools.toy.train_video PHASE --out FOLDER

All phases run `smp.training.run.loop`, so a run resumes when its command is given again. The first three don't depend
on one another:

- motion: the motion module alone, as AnimateDiff's: clips with their text.
- adapter: image projection and added projections, as IP-Adapter's: single pictures with their own embedding.
- semantic: the paper's stage (a), the predictor in token space (equation 7).
- decoding: the paper's stage (b), predictor, added projections and motion module together, from the other three.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...nodes.animatediff.loader import motion_weights
from ...nodes.animatediff.module import MotionModule
from ...smp.checkpoint import load_checkpoint
from ...smp.config import ProjectionConfig, SMPModelConfig
from ...smp.injection import AddedKV
from ...smp.model import SemanticMotion
from ...smp.training.config import TrainConfig
from ...smp.training.data.clips import Clip, ClipsInMemory
from ...smp.training.run.loop import train
from ...smp.training.run.start import start_smp
from ...smp.training.stages.decoding import DecodingStage
from ...smp.training.stages.semantic import SMP_FILE, SemanticStage, require_predictor
from ...smp.training.stages.stage import Stage
from .animation import FRAMES
from .clips import ToyClips
from .denoiser import ToyDenoiser, new_motion_module, start_from_text, toy_sites
from .text_encoder import WIDTH, load_clip
from .video_files import MOTION_WEIGHTS
from .vision import EMBED_WIDTH, load_vision

PREDICTOR = {"hidden": 192, "layers": 4, "heads": 6, "head_dim": 32}
IMAGE_TOKENS = 12
CLIPS = 1_000_000
"""Clips are drawn when they are asked for; so many never come round again."""
SEMANTIC_CLIPS, HELD_OUT_CLIPS = 12_288, 128
# One schedule for all: learning rate, iterations and clips per iteration are what a phase's own size calls for.
COMMON: dict[str, Any] = {
    "schedule": "cosine",
    "ema": 0.998,
    "frames": FRAMES,
    "workers": 0,
    "log_every": 20,
    "checkpoint_every": 200,
    "keep_checkpoints": 1,
    "validate_every": 400,
    "validation_clips": 64,
    "preview_clips": 0,
    "seed": 1,
}
PHASES: dict[str, dict[str, Any]] = {
    "motion": {
        "stage": "decoding",
        "learning_rate": 1e-3,
        "warmup": 100,
        "iterations": 1200,
        "global_batch": 4,
        "micro_batch": 4,
    },
    "adapter": {
        "stage": "decoding",
        "learning_rate": 1e-3,
        "warmup": 100,
        "iterations": 5000,
        "global_batch": 16,
        "micro_batch": 8,
        # Many of the pictures without their prompt: what the prompt says, the embedding must be able to say as well.
        "drop_text": 0.4,
    },
    "semantic": {
        "stage": "semantic",
        "learning_rate": 1e-3,
        "warmup": 200,
        "iterations": 4000,
        "global_batch": 64,
        "micro_batch": 64,
        "log_every": 100,
        "checkpoint_every": 1000,
        "validate_every": 1000,
        "validation_clips": HELD_OUT_CLIPS,
        "preview_clips": 2,
    },
    "decoding": {
        "stage": "decoding",
        "learning_rate": 7e-4,
        "warmup": 100,
        "iterations": 2600,
        "global_batch": 4,
        "micro_batch": 2,
        # The motion module must go on working with blank motion tokens: `bench transitions` compares with that.
        "drop_motion": 0.15,
        "drop_text": 0.3,
    },
}


class VideoStage(DecodingStage):
    """The motion module alone: no motion tokens."""

    fields = ("latents", "text")
    denoiser: ToyDenoiser

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        require_predictor(self.motion).requires_grad_(False)
        self.denoiser.added_kv.requires_grad_(False)

    def errors(self, batch: Clip) -> dict[str, Tensor]:
        """Denoising error of each clip, (B,)."""

        def predict(noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
            return self.denoiser.predict(noisy, timesteps, text, None)

        return {"loss": self.denoise(batch, predict)}

    def export(self, folder: Path) -> None:
        """Write the motion module."""
        self.denoiser.export(folder)


class AdapterStage(DecodingStage):
    """Every picture with its own embedding: image projection and added projections, no motion."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        require_predictor(self.motion).requires_grad_(False)
        assert self.motion.projection is not None
        self.motion.projection.requires_grad_(True)

    def path(self, tokens: Tensor) -> Tensor:
        """The true one: (B, F, N, C), unchanged."""
        return tokens


class SharedStage(DecodingStage):
    """The paper's stage (b), but every second clip is decoded from its frames' own embeddings.

    Without these, predictor and projections agree on a language of their own: the decoder then draws the encoder's
    embeddings worse than the predicted ones, and what is interpolated between them can't be compared.
    """

    def path(self, tokens: Tensor) -> Tensor:
        """(B, F, N, C) -> (B, F, N, C)."""
        own = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None, None] % 2 == 1
        return torch.where(own, tokens, super().path(tokens))


def phase_config(phase: str, out: Path, **changes: Any) -> TrainConfig:
    """The config of a phase."""
    model = SMPModelConfig(
        token_space="image_embeds",
        encoder_width=EMBED_WIDTH,
        sites=toy_sites(),
        guidance="concat",
        uncond="zero",
        projection=ProjectionConfig(EMBED_WIDTH, IMAGE_TOKENS, WIDTH),
    )
    whole = {"model": model.to_dict(), "predictor": PREDICTOR, "guidance": model.guidance}
    return TrainConfig(**{**COMMON, **PHASES[phase], "out": str(out), **whole, **changes})


@dataclass(frozen=True)
class Origins:
    """Folders of the runs that the decoding phase goes on from."""

    motion: Path
    adapter: Path
    semantic: Path

    def smp(self, config: TrainConfig) -> tuple[SemanticMotion, AddedKV]:
        """The semantic run's predictor with the adapter's projections."""
        motion, added_kv = start_smp(config)
        semantic, adapter = (load_checkpoint(folder / SMP_FILE) for folder in (self.semantic, self.adapter))
        predictor = {name: value for name, value in semantic.motion.items() if name.startswith("predictor.")}
        motion.load_state_dict({**adapter.motion, **predictor})
        added_kv.load_state_dict(adapter.added_kv)
        return motion, added_kv

    def motion_module(self) -> MotionModule:
        """The motion run's module, to be trained on."""
        path = self.motion / MOTION_WEIGHTS.name
        module = new_motion_module(seed=0)
        weights = motion_weights(comfy.utils.load_torch_file(str(path), safe_load=True), path.name)
        module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return module


def build_stage(phase: str, config: TrainConfig, blank: Clip, origins: Origins | None = None) -> Stage:
    """What a phase trains; ValueError if the decoding phase has no origins."""
    if phase == "decoding" and origins is None:
        raise ValueError("The decoding phase goes on from three other runs: give its origins.")
    motion, added_kv = origins.smp(config) if origins else start_smp(config)
    if phase == "semantic":
        return SemanticStage(motion, added_kv)
    if phase == "adapter":
        denoiser = ToyDenoiser(added_kv, None)
        start_from_text(added_kv, denoiser.unet)
        return AdapterStage(motion, denoiser, config, blank)
    module = origins.motion_module() if origins else new_motion_module(config.seed)
    stage = VideoStage if phase == "motion" else SharedStage
    return stage(motion, ToyDenoiser(added_kv, module), config, blank)


def clips_of(phase: str) -> tuple[Any, Any]:
    """Training and held-out clips of a phase."""
    readers: dict[str, Any] = {
        "clip": None if phase == "semantic" else load_clip(),
        "clip_vision": None if phase == "motion" else load_vision(),
    }
    frames = 1 if phase == "adapter" else FRAMES
    count = SEMANTIC_CLIPS if phase == "semantic" else CLIPS
    training = ToyClips("training", count, frames, **readers)
    held_out = ToyClips("held out", HELD_OUT_CLIPS, frames, **readers)
    return (in_memory(training), in_memory(held_out)) if phase == "semantic" else (training, held_out)


def in_memory(clips: ToyClips) -> ClipsInMemory:
    """The tokens of all clips, encoded once: training in token space goes over them many times."""
    return ClipsInMemory([{"tokens": clips[number]["tokens"]} for number in range(len(clips))], clips.blank)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--runs", type=Path, nargs=3, metavar=("MOTION", "ADAPTER", "SEMANTIC"), help="for decoding")
    parser.add_argument("--iterations", type=int, help="instead of the phase's own")
    arguments = parser.parse_args()
    if (arguments.phase == "decoding") != (arguments.runs is not None):
        parser.error("--runs goes with the decoding phase, and with no other")
    torch.set_num_threads(1)  # two processes of one thread beat one of two
    torch.set_flush_denormal(True)
    changes = {"iterations": arguments.iterations} if arguments.iterations is not None else {}
    config = phase_config(arguments.phase, arguments.out, **changes)
    clips, held_out = clips_of(arguments.phase)
    origins = Origins(*arguments.runs) if arguments.runs else None
    train(config, build_stage(arguments.phase, config, clips.blank, origins), clips, held_out)


if __name__ == "__main__":
    main()
