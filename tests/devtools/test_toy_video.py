"""The toy world's video model: what training sees is what the nodes run, and what it writes is what they load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import comfy.sample
import pytest
import safetensors.torch
import torch
from storydiffusion.devtools.tiny.motion import published
from storydiffusion.devtools.tiny.motion_oracle import record_unet_calls
from storydiffusion.devtools.tiny.seeded_weights import seeded_state_dict
from storydiffusion.devtools.toy import model as toy_model
from storydiffusion.devtools.toy.animation import FRAMES
from storydiffusion.devtools.toy.clips import ToyClips
from storydiffusion.devtools.toy.denoiser import ToyDenoiser, new_motion_module, toy_sites
from storydiffusion.devtools.toy.publish_video import publish
from storydiffusion.devtools.toy.text_encoder import load_clip
from storydiffusion.devtools.toy.train_video import PHASES, Origins, SharedStage, build_stage, phase_config
from storydiffusion.devtools.toy.video_files import MOTION_WEIGHTS, SMP_WEIGHTS
from storydiffusion.devtools.toy.vision import WEIGHTS as VISION_WEIGHTS
from storydiffusion.devtools.toy.vision import load_vision
from storydiffusion.nodes.animatediff.loader import load_motion_module
from storydiffusion.nodes.animatediff.module import MotionModule
from storydiffusion.nodes.animatediff.nodes import StoryApplyMotionModule
from storydiffusion.nodes.animatediff.schedule import MODEL_BETAS
from storydiffusion.nodes.motion_predictor.loading import load_smp
from storydiffusion.nodes.motion_predictor.patch import apply_smp
from storydiffusion.nodes.motion_predictor.predict import SMPEmbeds
from storydiffusion.smp.checkpoint import load_checkpoint
from storydiffusion.smp.injection import AddedKV
from storydiffusion.smp.training.config import TrainConfig
from storydiffusion.smp.training.run.loop import train
from storydiffusion.smp.training.run.start import start_smp


@pytest.fixture(scope="module")
def clips() -> ToyClips:
    return ToyClips("held out", 6, FRAMES, clip=load_clip(), clip_vision=load_vision())


def lively(module: MotionModule) -> MotionModule:
    """The module with seeded weights everywhere, so that it adds something."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if "pos_encoder" not in name}
    module.load_state_dict(seeded_state_dict(shapes, 3, torch.float32), strict=False)
    return module


def test_shipped_files_are_small_and_of_one_encoder() -> None:
    assert sum(path.stat().st_size for path in (MOTION_WEIGHTS, SMP_WEIGHTS, VISION_WEIGHTS)) < 12_000_000
    digests = {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (MOTION_WEIGHTS, SMP_WEIGHTS, VISION_WEIGHTS)
    }
    records = {path: json.loads(path.with_suffix(".json").read_text()) for path in digests}
    assert {path: record["sha256"] for path, record in records.items()} == digests
    assert records[MOTION_WEIGHTS]["encoder"] == records[SMP_WEIGHTS]["encoder"] == digests[VISION_WEIGHTS]


@pytest.mark.slow
def test_an_untrained_motion_module_adds_nothing() -> None:
    added_kv = AddedKV(toy_sites(), 256)
    noisy, text = torch.randn(1, 3, 4, 32, 32), torch.randn(1, 77, 256)
    at = torch.tensor([500])
    with torch.no_grad():
        still = ToyDenoiser(added_kv, None).predict(noisy, at, text, None)
        moving = ToyDenoiser(added_kv, new_motion_module(0)).predict(noisy, at, text, None)
        lively_one = ToyDenoiser(added_kv, lively(new_motion_module(0))).predict(noisy, at, text, None)
    torch.testing.assert_close(moving, still)
    assert (lively_one - still).abs().max() > 0.01


def test_training_sees_what_the_nodes_run(tmp_path: Path) -> None:
    """One sampling step through the nodes, and its UNet call again through the denoiser that training sees."""
    safetensors.torch.save_file(published(lively(new_motion_module(0)).state_dict()), tmp_path / "motion.safetensors")
    weights = load_checkpoint(SMP_WEIGHTS)
    smp = load_smp(lambda: weights, "")
    generator = torch.Generator().manual_seed(0)
    shape = weights.config.output_shape
    tokens, text = torch.randn(1, 3, *shape, generator=generator), torch.randn(1, 77, 256, generator=generator)
    model, _, _ = toy_model.load()
    module = load_motion_module(str(tmp_path / "motion.safetensors"))
    model = StoryApplyMotionModule.execute(model, module, 1.0, MODEL_BETAS).args[0]
    embeds = SMPEmbeds(tokens, torch.zeros(shape), weights.config.token_space)
    guided, calls = record_unet_calls(apply_smp(model, smp, embeds, 0, "concat", 1.0))
    noise = torch.randn(3, 4, 32, 32, generator=generator)
    conditioning = [[text, {}]]
    comfy.sample.sample(guided, noise, 1, 1.0, "euler", "normal", conditioning, conditioning, torch.zeros_like(noise))

    _, added_kv = weights.load()
    denoiser = ToyDenoiser(added_kv.float(), lively(new_motion_module(0)))
    call = calls[0]
    with torch.no_grad():
        predicted = denoiser.predict(call.x[None], call.timesteps[:1], text, tokens)[0]
    torch.testing.assert_close(predicted, call.output, atol=2e-4, rtol=2e-3)


def test_motion_file_holds_the_weights_under_animatediff_names(tmp_path: Path) -> None:
    module = lively(new_motion_module(0))
    named = published(module.state_dict())
    assert all(".temporal_transformer." in name for name in named)
    safetensors.torch.save_file(named, tmp_path / "motion.safetensors")
    loaded = load_motion_module(str(tmp_path / "motion.safetensors")).model.state_dict()
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(loaded[name].float(), tensor, atol=1e-2, rtol=1e-2)


def small(phase: str, out: Path) -> TrainConfig:
    """Two iterations of two clips."""
    sizes = {"iterations": 2, "global_batch": 2, "micro_batch": 2, "validation_clips": 2, "warmup": 1}
    return phase_config(phase, out, **sizes, checkpoint_every=2, log_every=1, preview_clips=1, preview_steps=2)


def test_every_second_clip_is_decoded_from_its_frames_own_embeddings(clips: ToyClips, tmp_path: Path) -> None:
    config = small("decoding", tmp_path)
    motion, added_kv = start_smp(config)
    stage = SharedStage(motion, ToyDenoiser(added_kv, None), config, clips.blank)
    tokens = torch.stack([clips[number]["tokens"] for number in range(3)])
    with torch.no_grad():
        shared, predicted = stage.path(tokens), motion.path(tokens[:, 0], tokens[:, -1], FRAMES)
    assert torch.equal(shared[1], tokens[1])
    assert torch.equal(shared[::2], predicted[::2])
    assert not torch.allclose(tokens, predicted)


@pytest.mark.slow
def test_all_phases_train_and_their_files_are_published(clips: ToyClips, tmp_path: Path) -> None:
    for phase in PHASES:
        config = small(phase, tmp_path / phase)
        runs = Origins(*(tmp_path / name for name in ("motion", "adapter", "semantic")))
        stage = build_stage(phase, config, clips.blank, runs if phase == "decoding" else None)
        train(config, stage, clips, clips)
    before, after = (load_checkpoint(tmp_path / phase / "smp.safetensors") for phase in ("adapter", "decoding"))
    assert torch.equal(before.motion["projection.proj.weight"], after.motion["projection.proj.weight"])
    assert not torch.equal(before.added_kv["blocks.0.to_v.weight"], after.added_kv["blocks.0.to_v.weight"])
    assert not torch.equal(before.motion["predictor.proj_out.weight"], after.motion["predictor.proj_out.weight"])
    motion = [safetensors.torch.load_file(tmp_path / phase / MOTION_WEIGHTS.name) for phase in ("motion", "decoding")]
    key = "mid_block.motion_modules.0.temporal_transformer.proj_out.weight"
    assert not torch.equal(motion[0][key], motion[1][key])

    (tmp_path / "published").mkdir()
    publish(tmp_path / "semantic", tmp_path / "decoding", tmp_path / "published")
    published: Any = load_checkpoint(tmp_path / "published" / SMP_WEIGHTS.name)
    assert published.config == after.config
    semantic = load_checkpoint(tmp_path / "semantic" / "smp.safetensors")
    for name, tensor in published.motion.items():
        origin = semantic if name.startswith("predictor.") else after
        assert torch.equal(tensor, origin.motion[name].half())
    assert all(torch.equal(tensor, after.added_kv[name].half()) for name, tensor in published.added_kv.items())
    load_motion_module(str(tmp_path / "published" / MOTION_WEIGHTS.name))
