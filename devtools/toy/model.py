"""The toy world's diffusion model: the host's own UNet in a small config, as a genuine MODEL, CLIP and VAE."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .pixel_vae import load_vae
from .text_encoder import WIDTH, load_clip

WEIGHTS = Path(__file__).parent / "toy_world.safetensors"
PIXEL_STD = 0.58
"""Standard deviation of the world's pixels on a scale of -1 to 1."""

# 32 x 32 is for pixels only; attention, self and cross, sits at 16 x 16 and 8 x 8.
UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": (1, 2, 3),
    "num_res_blocks": [0, 1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 1, 1, 1, 1],
    "context_dim": WIDTH,
    "use_spatial_transformer": True,
    "legacy": False,
    # Pooling and doubling instead of convolutions: a fifth of the training time, and nothing that could be seen.
    "conv_resample": False,
}


class ToyLatents(comfy.latent_formats.LatentFormat):
    """Pixels as latents; see `pixel_vae.to_latent`."""

    scale_factor = 1 / PIXEL_STD
    latent_channels = 4

    def __init__(self) -> None:
        red, green, blue = ([PIXEL_STD if row == column else 0.0 for column in range(3)] for row in range(3))
        self.latent_rgb_factors = [red, green, blue, [0.0, 0.0, 0.0]]


class ToyWorld(comfy.supported_models_base.BASE):
    """Model config, as the host keeps one for SD1.5: v-prediction on SD's noise schedule."""

    unet_config = UNET
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}  # noqa: RUF012  (the host's own declaration)
    latent_format = ToyLatents

    def model_type(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        """What the network predicts."""
        return comfy.model_base.ModelType.V_PREDICTION


def load_model(state: dict[str, torch.Tensor]) -> comfy.model_patcher.ModelPatcher:
    """A MODEL object from the UNet's weights, as the stock loaders make them."""
    config = ToyWorld(UNET)
    # float32 whatever the device: at this size speed is no concern, and results agree between devices.
    config.set_inference_dtype(torch.float32, None)
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model(state, device=offload_device)
    patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=load_device, offload_device=offload_device)
    missing, unexpected = model.diffusion_model.load_state_dict(
        {key: value.float() for key, value in state.items()}, strict=False, assign=patcher.is_dynamic()
    )
    if missing or unexpected:
        raise ValueError(f"The weights don't fit the toy UNet: missing {missing}, unexpected {unexpected}.")
    return patcher


def load(path: Path = WEIGHTS) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the toy world, weights from the safetensors file at `path`."""
    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    return load_model(state), load_clip(), load_vae()


def empty_unet() -> UNetModel:
    """The UNet in float32, without values: the host's layers come without initial ones."""
    return UNetModel(**UNET, **ToyWorld.unet_extra_config, operations=comfy.ops.disable_weight_init)


def new_unet(seed: int) -> UNetModel:
    """An untrained UNet in float32."""
    unet = empty_unet()
    generator = torch.Generator().manual_seed(seed)
    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            torch.nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            # Residual branches and the output begin at zero.
            if name.endswith(("proj_out", "out_layers.3", "out.2")):
                torch.nn.init.zeros_(module.weight)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return unet


def fused_attention(_chosen: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """An `optimized_attention_override`: the host's choice on a CPU saves memory and is three times slower to train."""
    return attention_pytorch(*args, **kwargs)
