"""Consistent Self-Attention beside other nodes on the same model: both act, and neither disturbs the other."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.ops
import comfy.sd
import nodes
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_merging import ModelMergeBlocks, ModelMergeSimple
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from storydiffusion.devtools.tiny.checkpoints import TINY_SD15
from storydiffusion.devtools.tiny.seeded_weights import parameter_shapes, seeded_state_dict
from storydiffusion.nodes.host.unet import unet_of
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.tests.helpers.sharing import prompts, share

Node = Callable[[Any], Any]
"""A node on a model: MODEL in, MODEL out."""


def draw(
    model: Any, positive: tuple[int, ...] = (1, 2), *, steps: int = 1, cfg: float = 5.0, size: int = 8
) -> torch.Tensor:
    """Latents of the panels. After a single step they are the guided prediction itself."""
    latent = {"samples": torch.zeros(len(positive), 4, size, size)}
    sampled = nodes.common_ksampler(model, 5, steps, cfg, "euler", "normal", prompts(*positive), prompts(99), latent)
    return sampled[0]["samples"]


def first_panel_reacts(model: Any, drawn: torch.Tensor) -> bool:
    """Whether the first panel comes out otherwise than `drawn` when the second panel's prompt is another."""
    return not torch.allclose(draw(model, (1, 3))[0], drawn[0], atol=1e-3)


def freeu(model: Any) -> Any:
    return FreeU_V2.execute(model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)[0]


def perturbed_attention(model: Any) -> Any:
    return PerturbedAttentionGuidance.execute(model, scale=3.0)[0]


def self_attention_guidance(model: Any) -> Any:
    return SelfAttentionGuidance.execute(model, scale=0.5, blur_sigma=2.0)[0]


def core_context_windows(model: Any, **changes: Any) -> Any:
    """The host's windows over the batch: two rows each, one of them shared with the next window."""
    inputs = {
        "context_length": 2,
        "context_overlap": 1,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "dim": 0,
        "freenoise": False,
        "causal_window_fix": True,
    }
    return ContextWindowsManualNode.execute(model, **{**inputs, **changes})[0]


def image_prompt(model: Any) -> Any:
    """Extra keys and values beside the text's, for the conditional half alone, as IP-Adapter nodes attach them."""
    generator = torch.Generator().manual_seed(4)
    image_k, image_v = (torch.randn(1, 4, 320, generator=generator) for _ in range(2))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        heads, chunks = extra_options["n_heads"], extra_options["cond_or_uncond"]
        out = host_attention.optimized_attention(q, k, v, heads)
        rows = q.shape[0] // len(chunks)
        weight = torch.tensor([0.0 if chunk else 1.0 for chunk in chunks]).repeat_interleave(rows)
        images = (tensor.expand(q.shape[0], -1, -1) for tensor in (image_k, image_v))
        return out + weight[:, None, None] * host_attention.optimized_attention(q, *images, heads)

    model = model.clone()
    for block in (("input", 1), ("middle", 0), ("output", 2)):
        model.set_model_attn2_replace(attend, *block)
    return model


def louder_prompt(model: Any) -> Any:
    model = model.clone()
    model.set_model_attn2_output_patch(lambda out, extra_options: out * 1.5)
    return model


def colder_attention(model: Any) -> Any:
    """An attention override that acts on every attention layer, as those for other kernels do."""
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda attention, q, *args, **kwargs: (
        attention(q * 0.5, *args, **kwargs)
    )
    return model


def lora(model: Any, strength: float = 1.0) -> Any:
    return comfy.sd.load_lora_for_models(model, None, lora_weights(), strength, 0.0)[0]


LORA_LAYERS = ["output_blocks.1.1.transformer_blocks.0.attn1.to_k", "input_blocks.1.1.transformer_blocks.0.attn2.to_v"]
LORA_RANK, LORA_ALPHA = 4, 2.0


@functools.cache
def lora_weights() -> dict[str, torch.Tensor]:
    """A LoRA under the names that published files have."""
    generator = torch.Generator().manual_seed(6)
    weights = {}
    for layer in LORA_LAYERS:
        name = "lora_unet_" + layer.replace(".", "_")
        inputs = 768 if "attn2.to_v" in layer else 320
        weights[f"{name}.lora_down.weight"] = torch.randn(LORA_RANK, inputs, generator=generator) / 10
        weights[f"{name}.lora_up.weight"] = torch.randn(320, LORA_RANK, generator=generator) / 5
        weights[f"{name}.alpha"] = torch.tensor(LORA_ALPHA)
    return weights


@pytest.fixture(scope="module")
def wide_sd15() -> Any:
    """A small SD1.5 whose lower level has twice the channels: FreeU acts on such levels only."""
    config = {**TINY_SD15.unet, "channel_mult": [1, 2]}
    shapes = parameter_shapes(UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init))
    return comfy.sd.load_diffusion_model_state_dict(seeded_state_dict(shapes, seed=0))


@pytest.fixture
def model(tiny_sd15: tuple[Any, Any, Any]) -> Any:
    return tiny_sd15[0]


def assert_both_act(model: Any, node: Node) -> None:
    """`node` and sharing both act, in either order alike; with sharing off, `node` is what it is alone."""
    alone, sharing, both = (draw(patched) for patched in (node(model), share(model), node(share(model))))
    assert both.isfinite().all()
    assert torch.equal(draw(share(node(model))), both)
    assert torch.equal(draw(share(node(model), sampling_rate=0.0)), alone)
    for other in (sharing, alone):
        assert all(not torch.allclose(one, another, atol=1e-3) for one, another in zip(both, other, strict=True))
    assert first_panel_reacts(node(share(model)), both)


@pytest.mark.slow
@pytest.mark.parametrize(
    "node",
    [
        perturbed_attention,
        self_attention_guidance,
        image_prompt,
        louder_prompt,
        colder_attention,
        lora,
    ],
)
def test_both_act_in_either_order(model: Any, node: Node) -> None:
    assert_both_act(model, node)


@pytest.mark.slow
def test_freeu(wide_sd15: Any) -> None:
    assert_both_act(wide_sd15, freeu)


@pytest.mark.slow
def test_core_context_windows_that_overlap(model: Any) -> None:
    """Three panels in two windows; fewer rows than a window are not cut, so two panels have no say here."""
    panels = (1, 2, 3)
    alone, both = draw(core_context_windows(model), panels), draw(core_context_windows(share(model)), panels)
    assert torch.equal(draw(share(core_context_windows(model)), panels), both)
    assert torch.equal(draw(share(core_context_windows(model), sampling_rate=0.0), panels), alone)
    assert not torch.allclose(both, draw(share(model), panels), atol=1e-3)
    assert not torch.allclose(both, alone, atol=1e-3)
    assert not torch.allclose(draw(core_context_windows(share(model)), (1, 4, 3))[0], both[0], atol=1e-3)


@pytest.mark.slow
def test_perturbed_attention_guidance_is_computed_from_what_shares(model: Any) -> None:
    """The three predictions that it is made of can be drawn one by one."""
    sharing = share(model, blocks="all")
    perturbed = sharing.clone()
    perturbed.set_model_attn1_replace(lambda q, k, v, extra_options: v, "middle", 0)
    positive, pushed_away = draw(sharing, cfg=1.0), draw(perturbed, cfg=1.0)
    expected = draw(sharing) + 3.0 * (positive - pushed_away)
    for both in (perturbed_attention(sharing), share(perturbed_attention(model), blocks="all")):
        torch.testing.assert_close(draw(both), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_self_attention_guidance_owns_the_middle_block(model: Any) -> None:
    """Put on a model that shares in all blocks, it records the panels' own attention there; the others share."""
    sharing = share(model, blocks="all")
    both = draw(self_attention_guidance(sharing))
    assert first_panel_reacts(self_attention_guidance(sharing), both)
    assert not torch.allclose(both, draw(sharing), atol=1e-3)


@pytest.mark.parametrize("panels", [(1, 2), (1, 2, 3)])
def test_self_attention_guidance_before_sharing_in_all_blocks_is_refused(model: Any, panels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Self-Attention Guidance"):
        draw(share(self_attention_guidance(model), blocks="all"), panels)


def test_lora_equals_weights_merged_by_hand(model: Any, tiny_sd15_file: Path) -> None:
    merged = comfy.sd.load_checkpoint_guess_config(str(tiny_sd15_file), output_vae=False, output_clip=False)[0]
    weights = dict(merged.model.diffusion_model.named_parameters())
    for layer in LORA_LAYERS:
        name = "lora_unet_" + layer.replace(".", "_")
        up, down = (lora_weights()[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
        weights[f"{layer}.weight"].data += (LORA_ALPHA / LORA_RANK * up @ down).to(weights[f"{layer}.weight"])
    by_hand = draw(share(merged))
    torch.testing.assert_close(draw(share(lora(model))), by_hand, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(draw(lora(share(model))), by_hand, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("merge", [ModelMergeSimple, ModelMergeBlocks])
def test_merged_models(model: Any, merge: Any) -> None:
    """Merging half of a model with a LoRA is half the LoRA; sharing comes from the first model, as all patches do."""
    ratios = {"ratio": 0.5} if merge is ModelMergeSimple else {"input": 0.5, "middle": 0.5, "out": 0.5}

    def merged(first: Any, second: Any) -> torch.Tensor:
        return draw(merge().merge(first, second, **ratios)[0])

    half = draw(share(lora(model, 0.5)))
    torch.testing.assert_close(merged(share(model), lora(model)), half, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(draw(share(merge().merge(model, lora(model), **ratios)[0])), half, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(merged(model, share(lora(model))), draw(lora(model, 0.5)), rtol=1e-3, atol=1e-3)


def test_another_attention_kernel_draws_the_same_panels(model: Any) -> None:
    other_kernel = model.clone()
    other_kernel.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda attention, *args, **kwargs: host_attention.attention_basic(*args, **kwargs)
    )
    torch.testing.assert_close(draw(share(other_kernel)), draw(share(model)), rtol=1e-3, atol=1e-3)


def hypertile(model: Any) -> Any:
    return HyperTile.execute(model, tile_size=32, swap_size=2, max_depth=0, scale_depth=False)[0]


def token_merging(model: Any) -> Any:
    return TomePatchModel.execute(model, 0.5)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("node", "name"), [(hypertile, "HyperTile"), (token_merging, "Token Merging")])
def test_what_cuts_or_merges_tokens_is_refused_in_either_order(model: Any, node: Node, name: str) -> None:
    for both in (node(share(model)), share(node(model))):
        with pytest.raises(ValueError, match=rf"needs every panel's tokens whole.*{name}.*remove it"):
            draw(both, size=16)
    # With sharing off nothing is asked of the tokens.
    assert torch.equal(draw(share(node(model), sampling_rate=0.0), size=16), draw(node(model), size=16))


def swallowing_masks(function: Callable[..., Any], *args: Any, mask: Any = None, **options: Any) -> Any:
    """An attention override that hands no mask on, as Sage attention's kernels swallow them."""
    return function(*args, mask=None, **options)


def overridden(model: Any) -> Any:
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = swallowing_masks
    return model


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.05])
def test_an_override_that_swallows_masks_changes_nothing(model: Any, strength: float) -> None:
    plain = share(model, strength=strength)
    assert torch.equal(draw(overridden(plain)), draw(plain))
    assert torch.equal(draw(share(overridden(model), strength=strength)), draw(plain))
    assert not torch.allclose(draw(plain), draw(share(model, strength=0.5)), atol=1e-3)


@pytest.mark.slow
def test_an_override_runs_where_nothing_is_weighed(model: Any) -> None:
    called: list[int] = []

    def counting(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        called.append(1)
        return function(*args, **options)

    patched = share(model)
    draw(patched)
    patched.model_options["transformer_options"]["optimized_attention_override"] = counting
    draw(patched)
    assert called


@pytest.mark.slow
def test_a_replacement_of_one_depth_behind_is_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(logging, "warning", warnings.append)  # the host's logger lets nothing through to pytest
    patched = share(model)
    patched.set_model_attn1_replace(lambda q, k, v, options: q, "output", 2, 0)
    draw(patched)
    assert "has replaced the self-attention of 1 of its 4 UNet blocks, the first of them ('output', 2)" in warnings[0]


@pytest.mark.slow
def test_one_panel_of_a_batch_is_refused_with_advice_that_fits(tiny_sd15: tuple[Any, Any, Any]) -> None:
    story = parse_story("[Bob] walks\n[Bob] reads", "[Bob] a man")
    with pytest.raises(ValueError, match=r"has 2 panels, but the latent batch has 1\..*keep the whole batch"):
        draw(share(tiny_sd15[0], story=story), (1,))
    with pytest.raises(ValueError, match=r"has 2 panels, but the latent batch has 3\. Connect panel_count[^.]*\.$"):
        draw(share(tiny_sd15[0], story=story), (1, 2, 3))


@pytest.mark.slow
def test_compiled_by_a_node_that_replaces_the_unet(model: Any) -> None:
    """As other packs compile; TorchCompileModel of the host drops guards that patches need, and is refused."""

    def compiled(model: Any) -> Any:
        model = model.clone()
        model.add_object_patch("diffusion_model", torch.compile(unet_of(model), backend="eager"))
        return model

    upper = {"blocks": "decoder_upper_levels"}
    expected = draw(share(model, **upper))
    assert torch.equal(draw(compiled(share(model, **upper))), expected)
    share(model, **upper)  # while the compiled one is at work in the loaded model
