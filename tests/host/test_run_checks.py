"""What is checked before a run's first step, on the host: rows, hints in context windows, nodes that undo others."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import comfy.controlnet
import nodes
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_torch_compile import TorchCompileModel
from safetensors.torch import save_file
from storydiffusion.devtools.tiny.controlnet import TINY_SD15_CONTROL, ensure_controlnet
from storydiffusion.devtools.tiny.motion import NARROW_UNET, NARROW_WIDTHS, motion_config, motion_tensors, seeded_sd15
from storydiffusion.nodes.animatediff.loader import load_motion_module
from storydiffusion.nodes.animatediff.nodes import StoryApplyMotionModule
from storydiffusion.nodes.consistent_attention.blocks import decoder_blocks
from storydiffusion.nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention
from storydiffusion.nodes.host import run_checks
from storydiffusion.nodes.host.unet import blocks_with_attention
from storydiffusion.nodes.prompts.nodes import StoryEncodePrompts
from storydiffusion.nodes.references.nodes import StoryAddReferencePanels
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.tests.helpers.sharing import prompts, share

SIZE = 64


@pytest.fixture
def model(tiny_sd15: tuple[Any, Any, Any]) -> Any:
    return tiny_sd15[0]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A narrow SD1.5 with a motion module."""
    file = tmp_path_factory.mktemp("motion") / "v2.safetensors"
    save_file(motion_tensors(motion_config(NARROW_WIDTHS, middle=True), 0), file)
    return StoryApplyMotionModule.execute(seeded_sd15(NARROW_UNET), load_motion_module(str(file))).result[0]


def text(rows: int, width: int = 768, seed: int = 1) -> list[Any]:
    return [[torch.randn(rows, 77, width, generator=torch.Generator().manual_seed(seed)), {}]]


def draw(model: Any, positive: Any, negative: Any = None, *, batch: int = 4, steps: int = 1) -> Any:
    latent = {"samples": torch.zeros(batch, 4, SIZE // 8, SIZE // 8)}
    negative = negative or text(1, positive[0][0].shape[-1], seed=2)
    sampled = nodes.common_ksampler(model, 5, steps, 5.0, "euler", "normal", positive, negative, latent)
    return sampled[0]["samples"]


def windowed(model: Any, length: int, causal: bool = False, schedule: str = "standard_static") -> Any:
    return ContextWindowsManualNode.execute(
        *(model, length, 0, schedule, 1, False, "flat", 0, False),
        cond_retain_index_list="",
        latent_retain_index_list="",
        causal_window_fix=causal,
    ).result[0]


class TestRows:
    @pytest.mark.parametrize("rows", [3, 5])
    def test_prompts_of_a_video(self, video: Any, rows: int) -> None:
        with pytest.raises(ValueError, match=rf"positive conditioning has {rows} rows \(one per frame\), .* 4 frames"):
            draw(video, text(rows, NARROW_UNET["context_dim"]))
        draw(video, text(4, NARROW_UNET["context_dim"]))

    @pytest.mark.parametrize("masks", [2, 6])
    def test_masks_of_a_prompt(self, model: Any, masks: int) -> None:
        def masked(count: int) -> Any:
            return nodes.ConditioningSetMask().append(text(1), torch.ones(count, SIZE, SIZE), "default", 1.0)[0]

        with pytest.raises(
            ValueError, match=rf"positive conditioning has {masks} masks \(one per panel\), .* 4 panels"
        ):
            draw(share(model), masked(masks))
        draw(share(model), masked(4))

    def test_tiles_in_the_batch(self, model: Any) -> None:
        """As Tiled Diffusion nodes do: each call holds the two halves of all panels as so many pictures."""

        def tiles(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
            halves = torch.cat(arguments["input"].chunk(2, dim=3))
            c = {name: value.repeat(2, 1, 1) for name, value in arguments["c"].items() if torch.is_tensor(value)}
            c["transformer_options"] = arguments["c"]["transformer_options"]
            return torch.cat(apply_model(halves, arguments["timestep"].repeat(2), **c).chunk(2), dim=3)

        tiled = share(model)
        tiled.set_model_unet_function_wrapper(tiles)
        with pytest.raises(ValueError, match="A model call holds 8 pictures, but the latent batch has 4"):
            draw(tiled, prompts(1, 2, 3, 4))


@pytest.fixture(scope="module")
def control(models: Path) -> Any:
    return comfy.controlnet.load_controlnet(str(ensure_controlnet(TINY_SD15_CONTROL, models / "controlnet")))


class TestHintsInContextWindows:
    def hints(self, count: int, seed: int = 7) -> torch.Tensor:
        return torch.rand(count, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(seed))

    def controlled(self, control: Any, images: torch.Tensor) -> Any:
        positive, negative = text(1), text(1, seed=2)
        return nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, images, 1.0, 0.0, 1.0)

    @pytest.mark.slow
    @pytest.mark.parametrize("causal", [False, True])
    def test_hint_i_reaches_row_i_and_no_other(self, model: Any, control: Any, causal: bool) -> None:
        """Six rows in windows of three, without sharing: as many hints as rows of both halves of guidance."""
        patched = windowed(share(model, sampling_rate=0.0), 3, causal)
        drawn = draw(patched, *self.controlled(control, self.hints(6)), batch=6)
        for row in (0, 4):
            hints = self.hints(6)
            hints[row] = self.hints(1, seed=8)[0]
            other = draw(patched, *self.controlled(control, hints), batch=6)
            assert (drawn - other).abs().amax((1, 2, 3)).gt(1e-3).nonzero().flatten().tolist() == [row]

    @pytest.mark.slow
    def test_windows_that_move_do_not_fill_the_memory(self, model: Any, control: Any, monkeypatch: Any) -> None:
        from storydiffusion.nodes.host import control_hints

        held: list[int] = []
        found = control_hints.WindowedHints._with_hints_of

        def watch(stand_in: Any, rows: tuple[int, ...]) -> Any:
            part = found(stand_in, rows)
            held.append(sum(map(len, stand_in.copies)))
            return part

        monkeypatch.setattr(control_hints.WindowedHints, "_with_hints_of", watch)
        patched = windowed(share(model, sampling_rate=0.0), 3, schedule="standard_uniform")
        draw(patched, *self.controlled(control, self.hints(7)), batch=7, steps=12)
        assert 7 < max(held) <= 4 * 7

    def test_hints_of_a_video(self, video: Any, control: Any) -> None:
        images = self.hints(3)
        positive = text(1, NARROW_UNET["context_dim"])
        conditioning = nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, positive, control, images, 1.0, 0.0, 1.0
        )
        with pytest.raises(ValueError, match=r"has 3 hint images, .* 4 frames. Give it one image per frame, in the f"):
            draw(video, *conditioning)


class TestNodesThatUndoOthers:
    @pytest.mark.slow
    @pytest.mark.parametrize("compiled_last", [True, False])
    def test_compiled_model(self, model: Any, compiled_last: bool) -> None:
        def compiled(model: Any) -> Any:
            return TorchCompileModel.execute(model, "inductor").result[0]

        patched = compiled(share(model)) if compiled_last else share(compiled(model))
        with pytest.raises(ValueError, match="TorchCompileModel is on this model"):
            draw(patched, prompts(1, 2, 3, 4))

    def test_compiled_video(self, video: Any) -> None:
        with pytest.raises(ValueError, match="and Apply Motion Module would draw something else"):
            draw(TorchCompileModel.execute(video, "inductor").result[0], text(1, NARROW_UNET["context_dim"]))

    def test_context_windows_behind_our_own(self, model: Any) -> None:
        with pytest.raises(ValueError, match="Context Windows behind Apply Consistent Self-Attention"):
            draw(windowed(share(model, window=2), 2), prompts(1, 2, 3, 4))

    def test_self_attention_replaced_behind_is_told(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        warnings: list[str] = []
        monkeypatch.setattr(logging, "warning", warnings.append)  # the host's logger lets nothing through to pytest
        patched = share(model)
        draw(patched, prompts(1, 2, 3, 4))
        assert not warnings
        blocks = decoder_blocks(blocks_with_attention(model.model.diffusion_model))
        patched.set_model_attn1_replace(lambda q, k, v, options: q, *blocks[-1].key)
        draw(patched, prompts(1, 2, 3, 4))
        assert f"of 1 of its {len(blocks)} UNet blocks, the first of them {blocks[-1].key}" in warnings[0]

    @pytest.mark.slow
    def test_another_schedule_behind_moves_start_and_end(self, model: Any) -> None:
        """Percents are of the schedule that is sampled with."""

        def rescheduled(model: Any) -> Any:
            return ModelSamplingDiscrete.patch(ModelSamplingDiscrete(), model, "eps", True)[0]

        part = {"start_percent": 0.1, "end_percent": 0.4}
        before, behind = share(rescheduled(model), **part), rescheduled(share(model, **part))
        panels = prompts(1, 2, 3, 4)
        drawn = draw(behind, panels, steps=6)
        assert torch.equal(drawn, draw(before, panels, steps=6))
        assert not torch.allclose(drawn, draw(rescheduled(model), panels, steps=6), atol=1e-3)


class TestReferencesInTwoSamplers:
    @pytest.mark.slow
    def test_they_would_be_noise_in_the_second(self, tiny_sd15: tuple[Any, Any, Any]) -> None:
        model, clip, vae = tiny_sd15
        sheet = "[Bob] a man"
        pictures = torch.rand(1, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(3))
        latent = {"samples": torch.zeros(2, 4, SIZE // 8, SIZE // 8)}
        story, latent, _ = StoryAddReferencePanels.execute(
            parse_story("[Bob] walks\n[Bob] reads", sheet), latent, pictures, vae, "[Bob] stands", sheet
        ).result
        patched = StoryApplyConsistentSelfAttention.execute(model, 0.5, 0, 0.0, 1.0, "decoder", 0, story).result[0]
        positive, negative = StoryEncodePrompts.execute(clip, story).result

        def sample(latent: Any, add_noise: str, start: int, end: int, leftover: str) -> Any:
            options = (5, 4, 5.0, "euler", "normal", positive, negative, latent, start, end, leftover)
            return nodes.KSamplerAdvanced().sample(patched, add_noise, *options)[0]

        halfway = sample(latent, "enable", 0, 2, "enable")
        with pytest.raises(ValueError, match="Reference panels can't go from one sampler to another"):
            sample(halfway, "disable", 2, 10000, "disable")
        sample(latent, "enable", 0, 10000, "disable")


def test_a_window_of_one_without_a_story_is_refused_at_once(model: Any) -> None:
    with pytest.raises(ValueError, match="window is 1, in which no panel sees another"):
        share(model, window=1)


@pytest.mark.parametrize("bounds", ["area", "mask bounds"])
def test_prompts_for_an_area_beside_subject_masks_are_refused(tiny_sd15: tuple[Any, Any, Any], bounds: str) -> None:
    model, clip, _ = tiny_sd15
    story = parse_story("[Bob] sings\n[Bob] walks", "[Bob] a man")
    patched = StoryApplyConsistentSelfAttention.execute(
        model, 0.5, 0, 0.0, 1.0, "decoder", 0, story, share="subjects"
    ).result[0]
    positive, negative = StoryEncodePrompts.execute(clip, story).result
    if bounds == "area":
        local = nodes.ConditioningSetArea().append(text(1), SIZE // 2, SIZE, 0, 0, 1.0)[0]
    else:
        mask = torch.zeros(1, SIZE, SIZE)
        mask[..., : SIZE // 2] = 1
        local = nodes.ConditioningSetMask().append(text(1), mask, bounds, 1.0)[0]
    with pytest.raises(ValueError, match="The positive conditioning has a prompt for an area"):
        draw(patched, positive + local, negative, batch=2)


def test_a_name_that_another_host_lacks_does_not_take_the_pack_down(monkeypatch: pytest.MonkeyPatch) -> None:
    known = run_checks.COMPILE_KEY
    monkeypatch.setitem(sys.modules, "comfy_api.torch_helpers.torch_compile", None)  # its import fails
    spec = importlib.util.find_spec(run_checks.__name__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert known == without.COMPILE_KEY
