"""What our motion module is measured against: diffusers' UNetMotionModel on the very same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import comfy.patcher_extension
import comfy.sample
import comfy.utils
import torch
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D, UNetMotionModel

from ...nodes.animatediff.module import MotionModuleConfig


class PerFrameGroupNorm(torch.nn.GroupNorm):
    """Group norm of (batch, channels, frames, height, width), one frame at a time.

    AnimateDiff's code normalises each frame by itself (`b c f h w -> (b f) c h w` before the norm), and so were
    its weights trained. diffusers hands the norm all frames at once, which pools their statistics: the one place
    where the reference itself differs from the original, and is set right here.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([super(PerFrameGroupNorm, self).forward(frame) for frame in x.unbind(2)], dim=2)


@dataclass(frozen=True)
class UNetCall:
    """One call of the host's UNet: rows are (chunks of the guidance) x (frames)."""

    x: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    chunks: int
    output: torch.Tensor


def reference_unet(
    unet: Any, config: MotionModuleConfig, motion: Mapping[str, torch.Tensor], *, pooled_norm: bool = False
) -> Any:
    """Return diffusers' UNet with the weights of the host's `unet` (shared, not copied) and of `motion`.

    `motion` has AnimateDiff's names and float32; diffusers' own converter renames it, and the positional encoding
    is diffusers' own. `pooled_norm` leaves the group norm as diffusers has it.
    """
    weights = unet.state_dict()
    names = comfy.utils.unet_to_diffusers(unet_config_of(unet))
    with torch.device("meta"):
        reference = UNetMotionModel(**_diffusers_config(unet, config))
    for module in reference.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            if not pooled_norm:
                norm = module.norm
                module.norm = PerFrameGroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps, device="meta")
            for block in module.transformer_blocks:
                channels = block.norm1.normalized_shape[0]
                block.pos_embed = SinusoidalPositionalEmbedding(channels, config.max_frames)
    converted = convert_animatediff_checkpoint_to_diffusers(dict(motion))
    converted |= {theirs: weights[ours] for theirs, ours in names.items() if ours in weights}
    missing, unexpected = reference.load_state_dict(converted, strict=False, assign=True)
    assert not unexpected
    assert all(key.endswith("pos_embed.pe") for key in missing), missing
    return reference.eval()


def unet_config_of(unet: Any) -> dict[str, Any]:
    """Return what the host's key map needs to know, read off the UNet's own weights."""
    return comfy.model_detection.detect_unet_config(unet.state_dict(), "")


def _diffusers_config(unet: Any, config: MotionModuleConfig) -> dict[str, Any]:
    levels = len(config.down)
    attends = unet_config_of(unet)["transformer_depth"]
    res_blocks = len(config.down[0])
    down = tuple(
        "CrossAttnDownBlockMotion" if attends[level * res_blocks] else "DownBlockMotion" for level in range(levels)
    )
    return {
        "down_block_types": down,
        "up_block_types": tuple(
            name.replace("DownBlock", "UpBlock") if "CrossAttn" not in name else name.replace("AttnDown", "AttnUp")
            for name in reversed(down)
        ),
        "block_out_channels": tuple(channels[0] for channels in config.down),
        "layers_per_block": res_blocks,
        "cross_attention_dim": unet_config_of(unet)["context_dim"],
        "num_attention_heads": 8,
        "motion_max_seq_length": config.max_frames,
        "use_motion_mid_block": config.middle is not None,
    }


def reference_output(reference: Any, call: UNetCall) -> torch.Tensor:
    """Return what the reference makes of the same rows."""
    video = call.x.unflatten(0, (call.chunks, -1)).transpose(1, 2)  # (chunks, channels, frames, height, width)
    frames = video.shape[2]
    timesteps = call.timesteps[::frames]
    with torch.no_grad():
        output = reference(video, timesteps, encoder_hidden_states=call.context).sample
    return output.transpose(1, 2).flatten(0, 1)


def record_unet_calls(model: Any) -> tuple[Any, list[UNetCall]]:
    """Return a clone of `model`, and the list that receives what its UNet gets and gives while it is sampled."""
    calls: list[UNetCall] = []

    def record(executor: Any, x: torch.Tensor, timesteps: Any, context: Any, y: Any, control: Any, options: Any) -> Any:
        output = executor(x, timesteps, context, y, control, options)
        calls.append(UNetCall(x.clone(), timesteps, context, len(options["cond_or_uncond"]), output.clone()))
        return output

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "record", record)
    return model, calls


def seeded_conditioning(seed: int, width: int = 768, rows: int = 1) -> list[Any]:
    """Return a random CONDITIONING of 77 tokens."""
    tokens = torch.randn(rows, 77, width, generator=torch.Generator().manual_seed(seed))
    return [[tokens, {}]]


def sample_video(
    model: Any, frames: int, size: int = 16, *, steps: int = 1, cfg: float = 7.0, seed: int = 0
) -> torch.Tensor:
    """Sample with the host's sampler; returns latents (frames, 4, size, size).

    `size` must leave the lowest level some pixels: a group norm over one or two numbers amplifies rounding.
    """
    width = unet_config_of(model.model.diffusion_model)["context_dim"]
    positive, negative = seeded_conditioning(1, width), seeded_conditioning(2, width)
    latent = torch.zeros(frames, 4, size, size)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        *(model, noise, steps, cfg, "euler", "normal", positive, negative, latent), disable_pbar=True, seed=seed
    )


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return |value - reference| / |reference| in the Euclidean norm."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())
