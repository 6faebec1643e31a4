"""Our motion module in the host's UNet against diffusers on the same weights: float32, relative error <= 1e-4."""

import comfy.ops
import pytest
import storydiffusion.nodes.animatediff.module as motion_module
import torch
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from safetensors.torch import save_file
from storydiffusion.devtools.tiny.motion import NARROW_UNET, NARROW_WIDTHS, motion_config, motion_tensors, seeded_sd15
from storydiffusion.devtools.tiny.motion_oracle import (
    record_unet_calls,
    reference_output,
    reference_unet,
    relative_error,
    sample_video,
)
from storydiffusion.nodes.animatediff.loader import load_motion_module
from storydiffusion.nodes.animatediff.nodes import StoryApplyMotionModule

TOLERANCE = 1e-4
SMALL_UNET = {
    "model_channels": 32,
    "context_dim": 32,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1] * 6,
    "transformer_depth_middle": 1,
}
LAYOUTS = {
    "v2": (NARROW_UNET, motion_config(NARROW_WIDTHS)),
    "v3": (NARROW_UNET, motion_config(NARROW_WIDTHS, middle=False)),
    "small UNet": (SMALL_UNET, motion_config((32, 64, 64), res_blocks=1, max_frames=16)),
}


def unet_call(tmp_path, layout, frames):
    unet, config = LAYOUTS[layout]
    base = seeded_sd15(unet)
    tensors = motion_tensors(config, dtype=torch.float32)
    save_file(tensors, tmp_path / "module.safetensors")
    motion = load_motion_module(str(tmp_path / "module.safetensors"))
    model, calls = record_unet_calls(StoryApplyMotionModule.execute(base, motion).result[0])
    sample_video(model, frames)
    assert len(calls) == 1
    assert calls[0].chunks == 2
    return base, config, tensors, calls[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_unet_equals_diffusers(tmp_path, layout):
    base, config, tensors, call = unet_call(tmp_path, layout, frames=4)
    reference = reference_unet(base.model.diffusion_model, config, tensors)
    assert relative_error(call.output, reference_output(reference, call)) <= TOLERANCE
    still, calls = record_unet_calls(base)
    sample_video(still, 4)
    assert relative_error(calls[0].output, call.output) > 0.1  # the motion module does matter here


@pytest.mark.parametrize("layout", ["v2", "small UNet"])
def test_one_frame_equals_diffusers_as_it_is(tmp_path, layout):
    base, config, tensors, call = unet_call(tmp_path, layout, frames=1)
    reference = reference_unet(base.model.diffusion_model, config, tensors, pooled_norm=True)
    assert relative_error(call.output, reference_output(reference, call)) <= TOLERANCE


@pytest.mark.parametrize("channels", [320, 640, 1280])
def test_full_size_transformer_equals_diffusers_as_it_is(channels):
    """diffusers pools the group norm's statistics over frames, which changes nothing where all frames have the same:
    here each frame holds the pixels of the first in another order."""
    generator = torch.Generator().manual_seed(channels)
    frames, pixels = 16, 4
    theirs = AnimateDiffTransformer3D(
        num_attention_heads=8,
        attention_head_dim=channels // 8,
        in_channels=channels,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=32,
    ).eval()
    ours = motion_module.TemporalTransformer(channels, 32, comfy.ops.manual_cast)
    block, own_block = theirs.transformer_blocks[0], ours.transformer_blocks[0]
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=channels**-0.5, generator=generator)
    for target, source in [
        *((getattr(ours, name), getattr(theirs, name)) for name in ("norm", "proj_in", "proj_out")),
        (own_block.norms[0], block.norm1),
        (own_block.norms[1], block.norm2),
        (own_block.ff_norm, block.norm3),
        (own_block.ff, block.ff),
    ]:
        target.load_state_dict(source.state_dict())
    for target, source in zip(own_block.attention_blocks, (block.attn1, block.attn2), strict=True):
        target.load_state_dict({**source.state_dict(), "pos_encoder.weight": block.pos_embed.pe[0]}, strict=True)
    first = torch.randn(2, channels, pixels, generator=generator)
    orders = [torch.randperm(pixels, generator=generator) for _ in range(frames)]
    x = torch.stack([first[:, :, order] for order in orders], dim=1).reshape(2 * frames, channels, 2, 2)
    with torch.no_grad():
        assert relative_error(x + ours(x, frames, transformer_options={}), theirs(x, num_frames=frames)) <= TOLERANCE


def test_pixels_taken_in_parts_give_the_same(monkeypatch):
    torch.manual_seed(0)
    transformer = motion_module.TemporalTransformer(64, 32, comfy.ops.manual_cast)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2 * 3, 64, 5, 7)
    with torch.no_grad():
        whole = transformer(x, 3, transformer_options={})
        monkeypatch.setattr(motion_module, "MAX_SEQUENCES", 16)
        parts = transformer(x, 3, transformer_options={})
    assert relative_error(parts, whole) <= 1e-6
