"""The toy world's UNet with a motion module, as the denoiser that SMP training sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from diffusers import DDPMScheduler
from torch import Tensor

from ...nodes.animatediff.injection import MOTION_KEY, RunningMotion, layer_patches
from ...nodes.animatediff.module import MotionModule, MotionModuleConfig
from ...nodes.animatediff.sites import motion_sites
from ...nodes.motion_predictor.cross_attention import concat_attention
from ...nodes.motion_predictor.patch import cross_attention_sites
from ...smp.config import CrossAttentionSite
from ...smp.injection import AddedKV
from ...smp.training.stages.denoiser import Denoiser
from ..tiny.motion import positional_encoding, published
from .export import write_weights
from .model import PIXEL_STD, WEIGHTS, empty_unet, fused_attention
from .video_files import MOTION_WEIGHTS

MAX_FRAMES = 32
"""AnimateDiff's; clips of the toy world have 8."""


class ToyDenoiser(Denoiser):
    """The host's UNet, frozen, with the pack's motion module and added projections, both to be trained.

    Motion tokens enter as in equation 6. Latents are the model's own: `pixel_vae.to_latent` over PIXEL_STD.

    Args:
        added_kv: projections for all cross-attentions, in the order of `toy_sites`.
        motion_module: None: every frame is a picture of its own.
    """

    def __init__(self, added_kv: AddedKV, motion_module: MotionModule | None) -> None:
        """Loads the UNet's weights."""
        super().__init__(added_kv, toy_scheduler())
        self.unet = toy_unet()
        self.motion_module = motion_module
        self.unet.requires_grad_(False)

    def predict(self, noisy_frames: Tensor, timesteps: Tensor, text: Tensor, added_tokens: Tensor | None) -> Tensor:
        """See `Denoiser`; without `added_tokens` cross-attention reads the text alone."""
        batch, frames = noisy_frames.shape[:2]
        options: dict[str, Any] = {"optimized_attention_override": fused_attention}
        if self.motion_module is not None:
            transformers = {site.site: self.motion_module.get_submodule(site.path) for site in motion_sites(self.unet)}
            options[MOTION_KEY] = RunningMotion(transformers, frames, scale=1.0)
            options["patches"] = {"forward_timestep_embed_patch": layer_patches()}
        if added_tokens is not None:
            rows = added_tokens.flatten(0, 1)
            patches = {
                site.key: JointAttention(self.added_kv, index, rows) for index, site in enumerate(self.added_kv.sites)
            }
            options["patches_replace"] = {"attn2": patches}
        predicted: Tensor = self.unet(
            noisy_frames.flatten(0, 1),
            timesteps=timesteps.repeat_interleave(frames),
            context=text.repeat_interleave(frames, dim=0),
            transformer_options=options,
        )
        return predicted.unflatten(0, (batch, frames))

    def to_pixels(self, latents: Tensor) -> Tensor:
        """See `Denoiser`."""
        return ((latents[:, :, :3] * PIXEL_STD + 1) / 2).clamp(0, 1).movedim(2, -1)

    def export(self, folder: Path) -> None:
        """Write the motion module under AnimateDiff's names."""
        if self.motion_module is not None:
            write_weights(published(self.motion_module.state_dict()), folder / MOTION_WEIGHTS.name, {})


@dataclass(frozen=True)
class JointAttention:
    """`attn2_replace` patch of one cross-attention: text and motion tokens (rows, N', C') in one softmax."""

    added_kv: AddedKV
    position: int
    tokens: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """q, k, v: projected, (rows, tokens, C)."""

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            joined: Tensor = attention_pytorch(q, k, v, extra_options["n_heads"], mask=mask)
            return joined

        return concat_attention(q, (k, v), self.added_kv(self.position, self.tokens), attend)


def start_from_text(added_kv: AddedKV, unet: UNetModel) -> None:
    """Begin with the projections of the text, as IP-Adapter's training does: motion tokens begin as further words."""
    attentions = [block.attn2 for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    for own, attention in zip(added_kv.blocks, attentions, strict=True):
        own["to_k"].load_state_dict(attention.to_k.state_dict())  # type: ignore[index]
        own["to_v"].load_state_dict(attention.to_v.state_dict())  # type: ignore[index]


def toy_unet() -> UNetModel:
    """The trained UNet in float32, as a plain torch module."""
    unet = empty_unet()
    state = comfy.utils.load_torch_file(str(WEIGHTS), safe_load=True)
    unet.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return unet


def toy_sites() -> tuple[CrossAttentionSite, ...]:
    """The UNet's cross-attentions."""
    with torch.device("meta"):
        unet = empty_unet()
    return tuple(cross_attention_sites(unet))


def toy_scheduler() -> DDPMScheduler:
    """The toy model's noise schedule: SD's, under diffusers' name."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )


def toy_motion_config() -> MotionModuleConfig:
    """AnimateDiff v2's layout for the toy UNet: one temporal transformer behind every residual block."""
    with torch.device("meta"):
        unet = empty_unet()
    levels: dict[str, list[int]] = {}
    for site in motion_sites(unet):
        levels.setdefault(site.path.split(".motion_modules")[0], []).append(site.channels)

    def side(name: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(channels) for level, channels in levels.items() if level.startswith(name))

    return MotionModuleConfig(side("down_blocks"), levels["mid_block"][0], side("up_blocks"), MAX_FRAMES)


def new_motion_module(seed: int) -> MotionModule:
    """An untrained motion module that adds nothing yet."""
    module = MotionModule(toy_motion_config(), "toy", operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "pos_encoder" in name:
            parameter.data = positional_encoding(*parameter.shape)[0]
            parameter.requires_grad_(False)
        elif parameter.ndim > 1 and "proj_out" not in name:
            bound = parameter.shape[1] ** -0.5
            torch.nn.init.uniform_(parameter, -bound, bound, generator=generator)
        else:
            torch.nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
    return module
