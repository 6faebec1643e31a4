"""The decoding stage on diffusers' UNet, and what it trains in the host's nodes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from diffusers import DDPMScheduler, UNetMotionModel
from storydiffusion.devtools.tiny.clips import tiny_config
from storydiffusion.devtools.tiny.motion import NARROW_UNET, NARROW_WIDTHS, motion_config, motion_tensors, seeded_sd15
from storydiffusion.devtools.tiny.motion_oracle import record_unet_calls, reference_unet, relative_error, sample_video
from storydiffusion.devtools.tiny.smp import tiny_clip_vision
from storydiffusion.nodes.animatediff.loader import load_motion_module
from storydiffusion.nodes.animatediff.nodes import StoryApplyMotionModule
from storydiffusion.nodes.motion_predictor.nodes import StoryApplySMP, StoryLoadSMP, StorySemanticMotionPredictor
from storydiffusion.smp.config import SD15_SITES
from storydiffusion.smp.injection import AddedKV
from storydiffusion.smp.training.config import TrainConfig
from storydiffusion.smp.training.data.clips import ClipsInMemory, generator_at, stack
from storydiffusion.smp.training.run.loop import train
from storydiffusion.smp.training.run.start import start_smp
from storydiffusion.smp.training.stages.decoding import DecodingStage
from storydiffusion.smp.training.stages.load_sd15 import animatediff_scheduler
from storydiffusion.smp.training.stages.sampling import Conditioning, sample_clips
from storydiffusion.smp.training.stages.unet_denoiser import PerFrameGroupNorm, UNetMotionDenoiser, unet_sites
from torch import Tensor

FRAMES, TEXT_WIDTH, EMBED_WIDTH = 4, 32, 24
MOTION = motion_config(NARROW_WIDTHS)


class PreviewingDenoiser(UNetMotionDenoiser):
    """Shows the first three latent channels, since the small UNet has no VAE."""

    def to_pixels(self, latents: Tensor) -> Tensor:
        return latents[:, :, :3].movedim(2, -1).sigmoid()


@functools.cache
def models() -> tuple[Any, UNetMotionModel]:
    """The host's narrow SD1.5, and diffusers' UNet with its weights and a motion module's; to be copied."""
    base = seeded_sd15(NARROW_UNET)
    unet = reference_unet(base.model.diffusion_model, MOTION, motion_tensors(MOTION, dtype=torch.float32))
    return base, unet


@pytest.fixture(scope="module")
def base() -> Any:
    return models()[0]


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> Iterator[None]:
    """The host's model must be gone before the interpreter is."""
    yield
    models.cache_clear()


def decoding_config(out: Path, **changes: Any) -> TrainConfig:
    model = {
        "token_space": "image_embeds",
        "encoder_width": EMBED_WIDTH,
        "sites": [vars(site) for site in unet_sites(models()[1])],
        "guidance": "concat",
        "uncond": "zero",
        "projection": {"embed_width": EMBED_WIDTH, "tokens": 2, "width": 16},
    }
    small = {"stage": "decoding", "frames": FRAMES, "iterations": 2, "global_batch": 2, "micro_batch": 2}
    return tiny_config(out, model=model, preview_steps=2, **{**small, **changes})


def make_stage(config: TrainConfig) -> DecodingStage:
    """A stage on diffusers' UNet with copies of the host's weights."""
    unet = copy.deepcopy(models()[1])  # the oracle shares the host's weights, which training must not change
    motion, added_kv = start_smp(config)
    denoiser = PreviewingDenoiser(
        unet,
        added_kv,
        animatediff_scheduler(),
        guidance=config.guidance,
        train_motion_module=config.train_motion_module,
    )
    blank = {"tokens": torch.zeros(1, EMBED_WIDTH), "text": torch.zeros(77, TEXT_WIDTH)}
    return DecodingStage(motion, denoiser, config, blank)


def clips(count: int = 4) -> ClipsInMemory:
    shapes = {"tokens": (FRAMES, 1, EMBED_WIDTH), "latents": (FRAMES, 4, 8, 8), "text": (77, TEXT_WIDTH)}
    made = [
        {name: torch.randn(shape, generator=generator_at(5, number)) for name, shape in shapes.items()}
        for number in range(count)
    ]
    return ClipsInMemory(made, {})


def changed(stage: DecodingStage, before: dict[str, Tensor]) -> set[str]:
    """Parts of the stage that training moved."""
    parts = ("motion.predictor", "motion.projection", "denoiser.added_kv")
    moved = set()
    for name, value in stage.state_dict().items():
        if not torch.equal(value, before[name]):
            part = next((part for part in parts if name.startswith(part)), "unet")
            moved.add("motion module" if ".motion_modules." in name else part)
    return moved


def test_sites_of_sd15_are_the_ones_that_files_number() -> None:
    with torch.device("meta"):
        unet = UNetMotionModel(cross_attention_dim=768, num_attention_heads=8)
    assert unet_sites(unet) == SD15_SITES


@pytest.mark.slow
def test_projections_for_another_unet_are_refused(tmp_path: Path) -> None:
    unet = copy.deepcopy(models()[1])
    with pytest.raises(ValueError, match=r"The UNet's cross-attentions are .*'input', 1, 0.* channels"):
        UNetMotionDenoiser(unet, AddedKV(SD15_SITES, 16), animatediff_scheduler(), guidance="concat")
    sample = DDPMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="predicts 'sample'; it must be 'epsilon' or 'v_prediction'"):
        UNetMotionDenoiser(unet, AddedKV(unet_sites(unet), 16), sample, guidance="concat")


@pytest.mark.slow
@pytest.mark.parametrize("with_motion", [True, False])
def test_training_moves_what_it_should_and_nothing_else(tmp_path: Path, with_motion: bool) -> None:
    config = decoding_config(tmp_path / "run", train_motion_module=with_motion, gradient_checkpointing=False)
    stage = make_stage(config)
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    train(config, stage, clips())
    expected = {"motion.predictor", "denoiser.added_kv"} | ({"motion module"} if with_motion else set())
    assert changed(stage, before) == expected


@pytest.mark.slow
def test_the_loss_is_the_denoising_error_with_dropped_conditioning_blank(tmp_path: Path) -> None:
    config = decoding_config(tmp_path / "run")
    stage = make_stage(config)
    torch.nn.init.normal_(stage.denoiser.added_kv.blocks[0]["to_v"].weight)
    batch = stack([clips()[0], clips()[0]]) | {
        "noise": torch.randn(2, FRAMES, 4, 8, 8, generator=generator_at(0, 0)),
        "timesteps": torch.tensor([100, 900]),
        "drop_motion": torch.tensor([False, True]),
        "drop_text": torch.tensor([True, False]),
    }
    with torch.no_grad():
        loss = stage(batch)
        betas = torch.linspace(0.00085, 0.012, 1000)  # AnimateDiff's: straight from SD1.5's first to its last
        alphas = (1 - betas).cumprod(0)[batch["timesteps"]][:, None, None, None, None]
        noisy = alphas.sqrt() * batch["latents"] + (1 - alphas).sqrt() * batch["noise"]
        tokens = stage.motion.transition(batch["tokens"][:, 0], batch["tokens"][:, -1], FRAMES)
        nothing = stage.motion.project(torch.zeros(FRAMES, 1, EMBED_WIDTH))
        added = torch.stack([tokens[0], nothing])
        text = torch.stack([torch.zeros(77, TEXT_WIDTH), batch["text"][1]])
        error = stage.denoiser.predict(noisy, batch["timesteps"], text, added) - batch["noise"]
    torch.testing.assert_close(loss, error.square().mean(dim=(1, 2, 3, 4)))
    stage.denoiser.scheduler = DDPMScheduler.from_config(
        stage.denoiser.scheduler.config, prediction_type="v_prediction"
    )
    velocity = alphas.sqrt() * batch["noise"] - (1 - alphas).sqrt() * batch["latents"]
    with torch.no_grad():
        torch.testing.assert_close(stage(batch), (error + batch["noise"] - velocity).square().mean(dim=(1, 2, 3, 4)))


def test_clips_of_a_batch_are_denoised_as_each_alone(tmp_path: Path) -> None:
    stage = make_stage(decoding_config(tmp_path / "run"))
    with torch.no_grad():
        for parameter in stage.denoiser.added_kv.parameters():
            parameter.normal_(std=0.3, generator=generator_at(0, 0))
    numbers = (0, 1, 2)
    drawn = [clips()[number] | stage.draw(clips()[number], generator_at(0, number)) for number in numbers]
    kept = {"drop_motion": torch.tensor(False), "drop_text": torch.tensor(False)}
    drawn = [clip | kept | {"timesteps": torch.tensor(200 + 300 * number)} for number, clip in enumerate(drawn)]
    with torch.no_grad():
        together = stage.errors(stack(drawn))
        alone = [stage.errors(stack([clip])) for clip in drawn]
        other = {**drawn[0], "text": drawn[1]["text"]}, {**drawn[0], "tokens": drawn[1]["tokens"]}
        mixed = [stage.errors(stack([clip]))["denoising"] for clip in other]
    for name, errors in together.items():
        torch.testing.assert_close(errors, torch.cat([error[name] for error in alone]))
    assert all((error - alone[0]["denoising"]).abs() > 1e-3 * error for error in mixed)  # a mix-up would be seen


@pytest.mark.slow
def test_token_weight_adds_equation_7_and_keeps_the_predictor_in_the_encoders_space(tmp_path: Path) -> None:
    errors = {}
    for weight in (0.0, 5.0):
        config = decoding_config(tmp_path / str(weight), token_weight=weight, iterations=12, learning_rate=5e-3)
        stage = make_stage(config)
        with torch.no_grad():  # projections that read the predictor from the first step on
            for parameter in stage.denoiser.added_kv.parameters():
                parameter.normal_(std=0.3)
        train(config, stage, clips())
        batch = stack([clips(3)[number] | stage.draw(clips(3)[number], generator_at(0, number)) for number in range(3)])
        with torch.no_grad():
            parts, path = stage.errors(batch), stage.path(batch["tokens"])
        torch.testing.assert_close(parts["tokens"], (path - batch["tokens"]).square().mean(dim=(1, 2, 3)))
        torch.testing.assert_close(parts["loss"], parts["denoising"] + weight * parts["tokens"])
        torch.testing.assert_close(stage(batch), parts["loss"])
        errors[weight] = parts["tokens"].mean().item()
    assert errors[5.0] < 0.8 * errors[0.0]


@pytest.mark.slow
def test_checkpointed_gradients_are_the_same(tmp_path: Path) -> None:
    config = decoding_config(tmp_path / "run")
    batch = {
        **stack([clips()[0]]),
        **{name: value[None] for name, value in make_stage(config).draw(clips()[0], generator_at(0, 1)).items()},
    }
    gradients, calls = [], []
    for saving in (False, True):
        stage = make_stage(config)
        if saving:
            stage.denoiser.enable_gradient_checkpointing()
        norms = [module for module in stage.modules() if isinstance(module, PerFrameGroupNorm)]
        counted: list[int] = []
        for number, norm in enumerate(norms):
            norm.register_forward_hook(lambda *_, number=number, counted=counted: counted.append(number))
        stage(batch).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in stage.trained().items()})
        calls.append([counted.count(number) for number in range(len(norms))])
    assert {*calls[0]} == {1}
    assert {*calls[1]} == {2}  # each motion module is computed again once, the middle one too
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_group_norm_takes_each_frame_by_itself() -> None:
    x = torch.randn(2, 8, 3, 4, 4) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    norm = PerFrameGroupNorm(4, 8)
    whole = norm(x)
    for frame in range(3):
        torch.testing.assert_close(whole[:, :, frame], torch.nn.functional.group_norm(x[:, :, frame], 4))


@pytest.mark.slow
def test_ends_are_held_and_guidance_one_asks_once(tmp_path: Path) -> None:
    stage = make_stage(decoding_config(tmp_path / "run"))
    given = Conditioning(torch.randn(1, FRAMES, 2, 16), torch.randn(1, 77, TEXT_WIDTH))
    blank = Conditioning(torch.zeros(1, FRAMES, 2, 16), torch.zeros(1, 77, TEXT_WIDTH))
    noise, ends = torch.randn(1, FRAMES, 4, 8, 8), torch.randn(1, 2, 4, 8, 8)
    held = sample_clips(stage.denoiser, given, blank, noise, steps=2, cfg=2.0, ends=ends)
    assert torch.equal(held[:, [0, -1]], ends)
    free = sample_clips(stage.denoiser, given, blank, noise, steps=2, cfg=2.0)
    assert not torch.allclose(held[:, 1:-1], free[:, 1:-1], rtol=1e-3)
    unguided = sample_clips(stage.denoiser, given, blank, noise, steps=2, cfg=1.0)
    same = sample_clips(stage.denoiser, given, given, noise, steps=2, cfg=3.0)
    torch.testing.assert_close(unguided, same, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DecodingStage]:
    """A run of two iterations from projections that are not zero, and the stage with the averaged weights it saved."""
    out = tmp_path_factory.mktemp("decoding")
    config = decoding_config(out, validate_every=2)
    stage = make_stage(config)
    with torch.no_grad():
        for parameter in stage.denoiser.added_kv.parameters():
            parameter.normal_(std=0.3)
    train(config, stage, clips(), clips(2))
    state = torch.load(out / "checkpoints" / "step-000000002.pt", weights_only=True)
    stage.load_state_dict(state["average"], strict=False)
    return out, stage


def test_previews_are_clips(trained: tuple[Path, DecodingStage]) -> None:
    names = sorted(path.name for path in (trained[0] / "previews" / "step-000000002").iterdir())
    assert names == [f"clip-{number}-{kind}.gif" for number in (0, 1) for kind in ("drawn", "true")]


def hosts_smp_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's nodes find SMP files in this folder alone, until the test ends."""
    _, extensions = folder_paths.folder_names_and_paths["smp"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "smp", ([str(folder)], extensions))
    monkeypatch.delitem(folder_paths.filename_list_cache, "smp", raising=False)


@pytest.mark.slow
def test_the_host_computes_with_the_trained_files_what_training_computed(
    base: Any, trained: tuple[Path, DecodingStage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, stage = trained
    (tmp_path / "trained_decoding.safetensors").write_bytes((out / "smp.safetensors").read_bytes())
    hosts_smp_folder(tmp_path, monkeypatch)
    with torch.inference_mode():
        smp, summary = StoryLoadSMP.execute(smp="trained_decoding.safetensors", ip_adapter="none").args
        assert summary.startswith("Trained SMP: 'trained_decoding.safetensors'")
        clip_vision = tiny_clip_vision(embed_width=EMBED_WIDTH)
        panels = torch.rand(2, 32, 32, 3, generator=generator_at(0, 0))
        embeds = StorySemanticMotionPredictor.execute(clip_vision, smp, panels, FRAMES).args[0]
        ends = clip_vision.encode_image(panels)["image_embeds"].float()[:, None]
        expected = stage.motion.transition(ends[:1], ends[1:], FRAMES)
        torch.testing.assert_close(embeds.tokens, expected, rtol=1e-4, atol=1e-5)

        module = load_motion_module(str(out / "motion_module.safetensors"))
        animated = StoryApplyMotionModule.execute(base, module).result[0]
        guided = StoryApplySMP.execute(animated, smp, embeds, 0, 1.0, "as trained").args[0]
        model, calls = record_unet_calls(guided)
        sample_video(model, FRAMES, cfg=1.0)
        call = calls[0]
        predicted = stage.denoiser.predict(call.x[None], call.timesteps[:1], call.context[:1], expected)[0]
        assert relative_error(call.output, predicted) <= 1e-4

        model, calls = record_unet_calls(guided)
        sample_video(model, FRAMES, cfg=3.0)  # two clips in a call: the prompt's, and the empty one's
        both = calls[0]
        assert both.chunks == 2
        assert relative_error(both.context[0], both.context[FRAMES]) > 0.1
        motions = torch.cat([expected, stage.blank().expand_as(expected)])
        if not torch.allclose(both.context[0], call.context[0]):  # the host puts either first
            motions = motions.flip(0)
        rows = both.x.unflatten(0, (2, FRAMES)), both.timesteps[::FRAMES], both.context[::FRAMES]
        together = stage.denoiser.predict(*rows, motions)
        assert relative_error(both.output, together.flatten(0, 1)) <= 1e-4
        assert relative_error(both.output, stage.denoiser.predict(*rows, motions.flip(0)).flatten(0, 1)) > 1e-2

        plain, calls = record_unet_calls(animated)
        sample_video(plain, FRAMES, cfg=1.0)
        assert relative_error(calls[0].output, predicted) > 1e-2  # the SMP does matter here


def test_decoupled_guidance_is_trained_as_the_host_runs_it(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = decoding_config(tmp_path / "run", guidance="decoupled", preview_clips=0)
    stage = make_stage(config)
    with torch.no_grad():
        for parameter in stage.denoiser.added_kv.parameters():
            parameter.normal_(std=0.3)
    stage.export(tmp_path)
    (tmp_path / "smp.safetensors").rename(tmp_path / "decoupled.safetensors")
    hosts_smp_folder(tmp_path, monkeypatch)
    with torch.inference_mode():
        smp = StoryLoadSMP.execute(smp="decoupled.safetensors", ip_adapter="none").args[0]
        embeds = StorySemanticMotionPredictor.execute(
            tiny_clip_vision(embed_width=EMBED_WIDTH), smp, torch.rand(2, 32, 32, 3), FRAMES
        ).args[0]
        module = load_motion_module(str(tmp_path / "motion_module.safetensors"))
        animated = StoryApplyMotionModule.execute(base, module).result[0]
        guided = StoryApplySMP.execute(animated, smp, embeds, 0, 1.0, "as trained").args[0]
        model, calls = record_unet_calls(guided)
        sample_video(model, FRAMES, cfg=1.0)
        predicted = stage.denoiser.predict(
            calls[0].x[None], calls[0].timesteps[:1], calls[0].context[:1], embeds.tokens
        )[0]
        assert relative_error(calls[0].output, predicted) <= 1e-4


def test_a_stage_without_its_files_says_which(tmp_path: Path) -> None:
    from storydiffusion.smp.training.stages.load_sd15 import load_decoding_stage, load_unet, require_few_frames

    config = tiny_config(tmp_path, stage="decoding")
    motion, added_kv = start_smp(config)
    with pytest.raises(ValueError, match="The decoding stage needs `sd15`"):
        load_decoding_stage(config, motion, added_kv, {})
    config = replace(config, sd15=str(tmp_path), motion_module=str(tmp_path / "mm.ckpt"))
    with pytest.raises(ValueError, match="The clips have no text"):
        load_decoding_stage(config, motion, added_kv, {})
    with pytest.raises(ValueError, match=r"There is no unet/config.json in"):
        load_unet(tmp_path, tmp_path / "mm.ckpt")
    require_few_frames(32, models()[1])
    with pytest.raises(ValueError, match="frames is 33; it must be at most 32"):
        require_few_frames(33, models()[1])
