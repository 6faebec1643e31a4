"""A VAE object for pixel art: one latent pixel is one picture pixel, eight times enlarged."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
import torch.nn.functional as F

ENLARGED = 8
LUMA = (0.299, 0.587, 0.114)


def to_latent(images: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, h, w), -1 to 1, to latents (B, 4, h, w): red, green, blue and, as a fourth, their luma."""
    luma = (images * images.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    return torch.cat([images, luma], dim=1)


class PixelArtCoder(torch.nn.Module):
    """Stands where the host keeps an autoencoder; nothing in it is learned."""

    def __init__(self) -> None:
        super().__init__()
        # The host reads a module's device and dtype off its parameters.
        self.pixel_space_vae = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), -1 to 1, to (B, 4, H / 8, W / 8)."""
        return to_latent(F.avg_pool2d(pixels, ENLARGED))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) to (B, 3, 8 h, 8 w): sharp squares."""
        return F.interpolate(latents[:, :3], scale_factor=ENLARGED, mode="nearest")


def load_vae() -> comfy.sd.VAE:
    """A VAE object as the stock loaders make them."""
    # The host's own pixel-space VAE has everything but the enlargement.
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.ones(())})
    vae.first_stage_model = PixelArtCoder().to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.downscale_ratio = vae.upscale_ratio = ENLARGED
    vae.latent_channels = 4
    return vae
