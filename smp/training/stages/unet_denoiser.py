"""SD1.5 with an AnimateDiff motion module, on diffusers' `UNetMotionModel`, as a `Denoiser`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...atomic import atomic_write
from ...attention import attend
from ...config import CrossAttentionSite, Guidance
from ...injection import AddedKV
from .denoiser import Denoiser

MOTION_MODULE_FILE = "motion_module.safetensors"


class UNetMotionDenoiser(Denoiser):
    """diffusers' UNet with motion modules, frozen but for `added_kv` and (optionally) its motion modules.

    Args:
        unet: the UNet; its cross-attention processors are replaced.
        added_kv: projections for the cross-attentions that `unet_sites` lists, in that order.
        scheduler: the noise schedule.
        guidance: how P enters.
        train_motion_module: also train the motion modules.
        vae: decodes latents to look at; None where nobody looks.

    Raises:
        ValueError: `added_kv` is for other cross-attentions than the UNet has.
    """

    def __init__(
        self,
        unet: UNetMotionModel,
        added_kv: AddedKV,
        scheduler: DDPMScheduler,
        *,
        guidance: Guidance,
        train_motion_module: bool = True,
        vae: AutoencoderKL | None = None,
    ) -> None:
        """Takes the modules as they are."""
        super().__init__(added_kv, scheduler)
        self.unet, self.vae = unet, vae
        processors = dict(unet.attn_processors)
        places = dict(_cross_attentions(unet))
        if tuple(places.values()) != added_kv.sites:
            raise ValueError(
                f"The UNet's cross-attentions are {[site.key for site in places.values()]} with "
                f"{[site.channels for site in places.values()]} channels; the added projections are for "
                f"{[site.key for site in added_kv.sites]} with {[site.channels for site in added_kv.sites]}."
            )
        for position, name in enumerate(places):
            processors[f"{name}.processor"] = AddedKVProcessor(added_kv, position, guidance)
        unet.set_attn_processor(processors)
        for module in unet.modules():
            if isinstance(module, AnimateDiffTransformer3D):
                norm = module.norm
                module.norm = PerFrameGroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps)
                module.norm.load_state_dict(norm.state_dict())
        self.requires_grad_(False)
        added_kv.requires_grad_(True)
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(train_motion_module and ".motion_modules." in name)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: diffusers' own checkpoints, and the motion modules besides.

        diffusers leaves these out but in the middle, though at 16 frames they hold more than all the rest.
        """
        self.unet.enable_gradient_checkpointing()
        for block in (*self.unet.down_blocks, *self.unet.up_blocks):
            for module in block.motion_modules:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)

    def predict(self, noisy_frames: Tensor, timesteps: Tensor, text: Tensor, added_tokens: Tensor) -> Tensor:
        """See `Denoiser`."""
        frames = noisy_frames.shape[1]
        rows = text.repeat_interleave(frames, dim=0), added_tokens.flatten(0, 1)  # (B * F, ., .)
        video = noisy_frames.transpose(1, 2)  # (B, c, F, h, w)
        return self.unet(video, timesteps, encoder_hidden_states=rows).sample.transpose(1, 2)

    def to_pixels(self, latents: Tensor) -> Tensor:
        """See `Denoiser`; ValueError without a VAE."""
        if self.vae is None:
            raise ValueError("This denoiser has no VAE, so its latents cannot be looked at.")
        flat = latents.flatten(0, 1).to(self.vae.dtype) / self.vae.config.scaling_factor
        with torch.no_grad():
            frames = [self.vae.decode(frame[None]).sample[0] for frame in flat]  # one at a time: memory
        pixels = (torch.stack(frames).movedim(1, -1).float() / 2 + 0.5).clamp(0, 1)
        return pixels.unflatten(0, latents.shape[:2])

    def export(self, folder: Path) -> None:
        """Write the motion modules under diffusers' names, which the pack's Load Motion Module reads."""
        tensors = {
            name: tensor.detach().contiguous().cpu()
            for name, tensor in self.unet.state_dict().items()
            if ".motion_modules." in name
        }
        with atomic_write(folder / MOTION_MODULE_FILE) as partial:
            save_file(tensors, partial)


class PerFrameGroupNorm(nn.GroupNorm):
    """Group norm of (B, C, F, h, w), one frame at a time.

    AnimateDiff normalises each frame by itself, and so does the pack; diffusers pools the statistics of all frames.
    Weights trained that way would be run in another way than they were trained.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, h, w) -> the same shape."""
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class AddedKVProcessor:
    """diffusers attention processor: cross-attention to text and to P_i (equation 6).

    It is handed both as `encoder_hidden_states`, a pair, which diffusers passes through for its IP-Adapters too.
    """

    def __init__(self, added_kv: AddedKV, position: int, guidance: Guidance) -> None:
        """Args: the projections; which of their sites this is; how P enters."""
        self.added_kv, self.position, self.guidance = added_kv, position, guidance

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, Tensor],
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Queries (B * F, Q, C); text (B * F, T, D) and motion tokens (B * F, N', C') -> (B * F, Q, C)."""
        text, tokens = encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        added_k, added_v = self.added_kv(self.position, tokens)
        if self.guidance == "concat":
            out = attend(q, torch.cat([k, added_k], dim=1), torch.cat([v, added_v], dim=1), attn.heads)
        else:
            out = attend(q, k, v, attn.heads) + attend(q, added_k, added_v, attn.heads)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def unet_sites(unet: UNetMotionModel) -> tuple[CrossAttentionSite, ...]:
    """The UNet's cross-attentions under the host's keys, in the order of IP-Adapter files."""
    return tuple(site for _, site in _cross_attentions(unet))


def _cross_attentions(unet: UNetMotionModel) -> Iterator[tuple[str, CrossAttentionSite]]:
    """diffusers' name and the host's key of each: input blocks, output blocks, middle.

    The host counts a block for the first convolution and one for each downsampling among the input blocks; among the
    output blocks only residual blocks count.
    """
    layers = unet.config.layers_per_block
    if not isinstance(layers, int):
        raise ValueError(f"layers_per_block is {layers}; UNets with another number at each level are not known here.")
    for block, prefix, levels in (("input", "down_blocks", unet.down_blocks), ("output", "up_blocks", unet.up_blocks)):
        for level, stage in enumerate(levels):
            for index, attention in enumerate(getattr(stage, "attentions", ())):
                number = level * (layers + 1) + index + (block == "input")
                yield from _sites(f"{prefix}.{level}.attentions.{index}", attention, block, number)
    for index, attention in enumerate(unet.mid_block.attentions):
        yield from _sites(f"mid_block.attentions.{index}", attention, "middle", index)


def _sites(prefix: str, attention: Any, block: str, number: int) -> Iterator[tuple[str, CrossAttentionSite]]:
    for index, transformer in enumerate(attention.transformer_blocks):
        channels = transformer.attn2.to_q.out_features
        yield f"{prefix}.transformer_blocks.{index}.attn2", CrossAttentionSite(block, number, index, channels)
