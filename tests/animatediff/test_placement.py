"""Where motion modules go, derived from the UNet; which frames a call holds; and what is refused with what words."""

import comfy.model_sampling
import comfy.ops
import pytest
import torch
from comfy.context_windows import IndexListContextWindow
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from safetensors.torch import save_file
from storydiffusion.devtools.tiny.checkpoints import TINY_SDXL
from storydiffusion.devtools.tiny.motion import (
    NARROW_UNET,
    NARROW_WIDTHS,
    SD15_LAYOUT,
    SD15_WIDTHS,
    TINY_SD15_VIDEO,
    motion_config,
    motion_tensors,
    seeded_sd15,
)
from storydiffusion.nodes.animatediff.loader import load_motion_module
from storydiffusion.nodes.animatediff.nodes import StoryApplyMotionModule
from storydiffusion.nodes.animatediff.schedule import MODEL_BETAS
from storydiffusion.nodes.animatediff.sites import motion_sites, require_fit
from storydiffusion.nodes.host.rows import row_indices, rows_per_chunk


def unet(**config):
    return UNetModel(**{**TINY_SD15_VIDEO.unet, **config}, device="meta", operations=comfy.ops.disable_weight_init)


@pytest.fixture(scope="module")
def base():
    return seeded_sd15(NARROW_UNET)


@pytest.fixture(scope="module")
def motion(tmp_path_factory):
    path = tmp_path_factory.mktemp("motion") / "motion.safetensors"
    save_file(motion_tensors(motion_config(NARROW_WIDTHS)), path)
    return load_motion_module(str(path))


def apply(model, motion_module, **inputs):
    return StoryApplyMotionModule.execute(model, motion_module, **inputs).result[0]


def test_sd15_gets_them_where_animatediff_puts_them():
    sites = motion_sites(unet(**SD15_LAYOUT, channel_mult=[1, 2, 4, 4]))
    found = {site.path: (*site.site[0], site.site[1], site.channels) for site in sites}
    inputs = [1, 2, 4, 5, 7, 8, 10, 11]
    expected = {"mid_block.motion_modules.0": ("middle", 0, SpatialTransformer, 1280)}
    for place, number in enumerate(inputs):
        layer = SpatialTransformer if number < 10 else ResBlock
        expected[f"down_blocks.{place // 2}.motion_modules.{place % 2}"] = (
            *("input", number, layer),
            SD15_WIDTHS[place // 2],
        )
    for number in range(12):
        layer = SpatialTransformer if number > 2 else ResBlock
        expected[f"up_blocks.{number // 3}.motion_modules.{number % 3}"] = (
            *("output", number, layer),
            SD15_WIDTHS[3 - number // 3],
        )
    assert found == expected


def test_smaller_unet_gets_them_by_its_own_levels_and_residual_blocks():
    small = unet(
        channel_mult=[1, 2, 2],
        num_res_blocks=[1, 1, 1],
        transformer_depth=[0, 1, 1],
        transformer_depth_output=[0, 0, 1, 1, 1, 1],  # the host reads it from its end
    )
    found = [(*site.site[0], site.site[1].__name__, site.path, site.channels) for site in motion_sites(small)]
    assert found == [
        ("input", 1, "ResBlock", "down_blocks.0.motion_modules.0", 320),
        ("input", 3, "SpatialTransformer", "down_blocks.1.motion_modules.0", 640),
        ("input", 5, "SpatialTransformer", "down_blocks.2.motion_modules.0", 640),
        ("middle", 0, "SpatialTransformer", "mid_block.motion_modules.0", 640),
        ("output", 0, "SpatialTransformer", "up_blocks.0.motion_modules.0", 640),
        ("output", 1, "SpatialTransformer", "up_blocks.0.motion_modules.1", 640),
        ("output", 2, "SpatialTransformer", "up_blocks.1.motion_modules.0", 640),
        ("output", 3, "SpatialTransformer", "up_blocks.1.motion_modules.1", 640),
        ("output", 4, "ResBlock", "up_blocks.2.motion_modules.0", 320),
        ("output", 5, "ResBlock", "up_blocks.2.motion_modules.1", 320),
    ]


def test_levels_without_residual_blocks_are_not_counted():
    shallow = unet(
        channel_mult=[1, 2, 2],
        num_res_blocks=[0, 1, 1],
        transformer_depth=[1, 1],
        transformer_depth_output=[0, 1, 1, 1, 1],
    )
    found = [(*site.site[0], site.path) for site in motion_sites(shallow)]
    assert found[:3] == [
        ("input", 2, "down_blocks.0.motion_modules.0"),
        ("input", 4, "down_blocks.1.motion_modules.0"),
        ("middle", 0, "mid_block.motion_modules.0"),
    ]
    assert found[-1] == ("output", 4, "up_blocks.2.motion_modules.0")


def test_v3_leaves_the_middle_out():
    sites = motion_sites(unet())
    fitting = require_fit(motion_config((320,) * 4, middle=False), "v3", sites)
    assert {site.path for site in sites} - {site.path for site in fitting} == {"mid_block.motion_modules.0"}


@pytest.mark.parametrize(
    "config", [TINY_SDXL.unet, {**TINY_SD15_VIDEO.unet, "channel_mult": [1, 2, 4, 4]}, {"num_res_blocks": [1] * 4}]
)
def test_unet_of_another_shape_is_refused_with_both_shapes(config):
    if config == {"num_res_blocks": [1] * 4}:
        config = {**config, "transformer_depth": [1, 1, 1, 0], "transformer_depth_output": [1] * 6 + [0] * 2}
    model = UNetModel(**{**TINY_SD15_VIDEO.unet, **config}, device="meta", operations=comfy.ops.disable_weight_init)
    with pytest.raises(
        ValueError, match=r"mm\.ckpt doesn't fit this model.*down_blocks\.3 320\+320.*The model's UNet: down"
    ):
        require_fit(motion_config((320,) * 4), "mm.ckpt", motion_sites(model))


def test_second_motion_module_is_refused(base, motion):
    with pytest.raises(ValueError, match="has a motion module already"):
        apply(apply(base, motion), motion)


def test_model_without_a_unet_is_refused(base, motion):
    transformer = base.clone()
    transformer.add_object_patch("diffusion_model", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"need an SD1\.5 UNet, but this model is a BaseModel \(Linear\)"):
        apply(transformer, motion)


def test_video_unet_is_refused(base, motion):
    video = base.clone()
    video.add_object_patch(
        "diffusion_model", unet(use_temporal_resblock=True, video_kernel_size=3, merge_strategy="fixed")
    )
    with pytest.raises(ValueError, match="is a video model already"):
        apply(video, motion)


def sigma_max(model):
    return float(model.get_model_object("model_sampling").sigma_max)


def test_beta_schedule(base, motion):
    assert sigma_max(base) == pytest.approx(14.615, abs=1e-3)
    assert sigma_max(apply(base, motion)) == pytest.approx(25.146, abs=1e-3)
    assert sigma_max(apply(base, motion, beta_schedule=MODEL_BETAS)) == pytest.approx(14.615, abs=1e-3)
    assert sigma_max(base) == pytest.approx(14.615, abs=1e-3)


@pytest.mark.parametrize("sampling", ["v_prediction", "lcm"])
def test_linear_betas_keep_prediction_type_and_distillation(base, motion, sampling):
    before = ModelSamplingDiscrete().patch(base, sampling, zsnr=False)[0]
    after = apply(before, motion)
    old, new = (model.get_model_object("model_sampling") for model in (before, after))
    assert type(new) is type(old)
    assert sigma_max(after) > 24
    zero_snr = apply(ModelSamplingDiscrete().patch(base, sampling, zsnr=True)[0], motion)
    assert sigma_max(zero_snr) > 1000


def test_schedule_without_betas_is_refused(base, motion):
    continuous = base.clone()
    continuous.add_object_patch("model_sampling", comfy.model_sampling.ModelSamplingContinuousEDM())
    with pytest.raises(ValueError, match="has no betas"):
        apply(continuous, motion)
    assert apply(continuous, motion, beta_schedule=MODEL_BETAS) is not None


def options(**entries):
    return {"cond_or_uncond": [1, 0], **entries}


def test_frames_per_call():
    assert rows_per_chunk(32, options()) == 16
    assert rows_per_chunk(48, options(cond_or_uncond=[1, 0, 0])) == 16
    assert rows_per_chunk(16, options(cond_or_uncond=[0])) == 16
    with pytest.raises(ValueError, match="33 rows"):
        rows_per_chunk(33, options())


def window(indices, anchor=None):
    made = IndexListContextWindow(indices, dim=0, total_frames=20)
    if anchor is not None:
        made.causal_anchor_index = anchor
    return made


@pytest.mark.parametrize(
    ("entries", "frames", "expected"),
    [
        ({}, 4, [0, 1, 2, 3]),
        ({"context_window": window([6, 7, 8])}, 3, [6, 7, 8]),
        ({"context_window": window([18, 19, 0, 1])}, 4, [18, 19, 0, 1]),
        ({"context_window": window([6, 7, 8], anchor=5)}, 4, [5, 6, 7, 8]),
        ({"context_window": window([6, 7, 8])}, 20, list(range(20))),
        ({"ad_params": {"sub_idxs": [4, 5, 6]}}, 3, [4, 5, 6]),
        ({"ad_params": {"sub_idxs": None}}, 3, [0, 1, 2]),
    ],
)
def test_frame_indices(entries, frames, expected):
    assert row_indices(frames, options(**entries)) == expected


@pytest.mark.parametrize("entries", [{"context_window": window([6, 7, 8])}, {"ad_params": {"sub_idxs": [6, 7, 8]}}])
def test_window_that_does_not_match_the_batch_is_refused(entries):
    with pytest.raises(ValueError, match="names 3 frames, but the call holds 5"):
        row_indices(5, options(**entries))


def test_an_sdxl_is_named_before_any_numbers(tiny_sdxl, motion):
    with pytest.raises(ValueError, match=r"^Motion modules are for SD1\.5, but this model is an SDXL\. Load an SD1\.5"):
        apply(tiny_sdxl[0], motion)
