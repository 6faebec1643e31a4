"""What `smp.prepare` takes for a clip, counted as training is: without content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...smp.encoder import PAPER_MODEL, OpenCLIPEncoder
from ...smp.training.config import TrainConfig
from ...smp.training.data.encode import TokenEncoder
from ...smp.training.data.videos import ClipShape, RawClip
from ...smp.training.precision import autocast
from ...smp.training.run.start import start_smp
from ..measuring.live_tensors import LiveTensors

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ClipCost:
    """Of encoding one clip."""

    tflop: float
    gigabytes: float


def count_tokens(config: TrainConfig) -> ClipCost:
    """Its tokens: the image encoder and the SMP's resampler."""
    with torch.device("meta"):
        clip = open_clip.create_model(PAPER_MODEL, pretrained=None, load_weights=False, device="meta")
        motion, _ = start_smp(config)
    encoder = TokenEncoder(OpenCLIPEncoder(clip.visual), motion, torch.device("meta"), config.mixed_precision)
    encoder.device = CPU  # where its weights are given a place
    return _count(lambda frames: encoder.encode(RawClip("", "", frames)), [encoder.encoder, encoder.motion], config)


def count_latents(config: TrainConfig) -> ClipCost:
    """Its latents: SD1.5's VAE encoder. The text of its caption takes a thousandth of that and isn't counted."""
    channels = (128, 256, 512, 512)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=2,
            latent_channels=4,
        ).eval()

    @torch.no_grad()
    def encode(frames: torch.Tensor) -> None:
        with autocast(config.mixed_precision, CPU):
            vae.encode(frames.movedim(-1, 1) * 2 - 1)

    return _count(encode, [vae], config)


def _count(encode: Callable[[torch.Tensor], object], models: list[nn.Module], config: TrainConfig) -> ClipCost:
    size = ClipShape().size
    with FakeTensorMode(), LiveTensors() as tensors:
        for model in models:
            model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        frames = torch.empty(config.frames, size, size, 3)
        encode(frames)
        gigabytes = tensors.peak / 1e9
        # Only plain attention is counted; it does what the fused kernels do, which keep less.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operations:
            encode(frames)
    return ClipCost(operations.get_total_flops() / 1e12, gigabytes)
