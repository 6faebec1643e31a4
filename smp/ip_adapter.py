"""IP-Adapter weights for SD1.5 as an SMP without a predictor: the decoder that exists today.

Read: the base kind (`image_proj.proj`: one image embedding -> 4 tokens) and Plus (`image_proj.latents`:
resampler, 16 tokens). Both were trained as decoupled cross-attention. Their unconditional rows saw a zero
embedding (base), or an image whose normalised pixels are zero, encoded (Plus).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .config import SD15_SITES, CrossAttentionSite, Interpolation, ProjectionConfig, ResamplerConfig, SMPModelConfig
from .model import SMPWeights

HEAD_DIM = 64  # of the Plus resampler; the one size that its weights do not show
LARGEST_SIZE = 2**20
"""Of any dimension that a config is read from; a weight of a damaged file may claim more than torch can count."""


def load_ip_adapter(
    file: Mapping[str, Any],
    *,
    interpolation: Interpolation = "linear",
    sites: Sequence[CrossAttentionSite] = SD15_SITES,
) -> SMPWeights:
    """Turn the contents of an IP-Adapter file into an SMP that interpolates.

    Args:
        file: the loaded file, nested (`.bin`) or flat (`.safetensors`).
        interpolation: the motion between two panels.
        sites: the UNet's cross-attentions in the order the file numbers them; channels come from the file.

    Raises:
        ValueError: not an IP-Adapter file, or one of a kind that does not fit; the message says what it is.
    """
    image_proj, ip_adapter = _section(file, "image_proj"), _section(file, "ip_adapter")
    if not image_proj or not ip_adapter:
        raise ValueError("This is not an IP-Adapter file: it lacks the sections image_proj and ip_adapter.")
    added_kv, numbered_sites = _added_kv(ip_adapter, sites)
    if "latents" in image_proj:
        resampler = _resampler_config(image_proj)
        latents = image_proj.pop("latents")
        motion = {f"resampler.{name}": tensor for name, tensor in image_proj.items()}
        motion["resampler.latents.weight"] = latents[0]
        config = SMPModelConfig(
            token_space="resampled",
            encoder_width=resampler.encoder_width,
            sites=numbered_sites,
            guidance="decoupled",
            uncond="blank_image",
            interpolation=interpolation,
            resampler=resampler,
        )
    else:
        projection = _projection_config(image_proj)
        motion = {f"projection.{name}": tensor for name, tensor in image_proj.items()}
        config = SMPModelConfig(
            token_space="image_embeds",
            encoder_width=projection.embed_width,
            sites=numbered_sites,
            guidance="decoupled",
            uncond="zero",
            interpolation=interpolation,
            projection=projection,
        )
    return SMPWeights(config, motion, added_kv)


def _section(file: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    nested = file.get(name)
    if isinstance(nested, Mapping):
        return {key: tensor for key, tensor in nested.items() if isinstance(key, str) and isinstance(tensor, Tensor)}
    return {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in file.items()
        if isinstance(key, str) and key.startswith(f"{name}.") and isinstance(tensor, Tensor)
    }


def _sizes(tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    """The shape of a weight from which sizes are read; ValueError if it can't be one of `rank` dimensions."""
    tensor, shape = tensors[name], tuple(tensors[name].shape)
    if len(shape) != rank or not all(1 <= size <= LARGEST_SIZE for size in shape):
        raise ValueError(
            f"This IP-Adapter file is damaged: {name} has the shape {shape}; it must have {rank} dimensions, each from "
            f"1 to {LARGEST_SIZE}."
        )
    # A pickled tensor can be of any size over a single number.
    if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise ValueError(f"This IP-Adapter file is damaged: {name} says {shape}, but doesn't hold as many numbers.")
    return shape


def _added_kv(
    ip_adapter: dict[str, Tensor], sites: Sequence[CrossAttentionSite]
) -> tuple[dict[str, Tensor], tuple[CrossAttentionSite, ...]]:
    extra = sorted({key.partition(".")[2] for key in ip_adapter} - {"to_k_ip.weight", "to_v_ip.weight"})
    if extra:
        raise ValueError(f"This is a FaceID kind of IP-Adapter (it holds {extra}); use ip-adapter_sd15 or -plus_sd15.")
    numbers = [str(number) for number in range(1, 2 * len(sites), 2)]
    found = {key.partition(".")[0] for key in ip_adapter}
    if found != set(numbers):
        raise ValueError(
            f"This IP-Adapter has projections for {len(found)} cross-attentions, SD1.5 has {len(sites)}; "
            "an SDXL file has 70. Use an IP-Adapter made for SD1.5."
        )
    tensors, numbered = {}, []
    for position, (number, site) in enumerate(zip(numbers, sites, strict=True)):
        for part in ("k", "v"):
            key = f"{number}.to_{part}_ip.weight"
            if key not in ip_adapter:
                raise ValueError(f"This IP-Adapter file is incomplete: ip_adapter.{key} is missing.")
            tensors[f"blocks.{position}.to_{part}.weight"] = ip_adapter[key]
        numbered.append(replace(site, channels=_sizes(ip_adapter, f"{number}.to_k_ip.weight", 2)[0]))
    return tensors, tuple(numbered)


def _projection_config(image_proj: dict[str, Tensor]) -> ProjectionConfig:
    if "proj.weight" not in image_proj or "norm.weight" not in image_proj:
        kind = "full-face or FaceID" if "proj.0.weight" in image_proj else "unknown"
        raise ValueError(
            f"This IP-Adapter is of a kind ({kind}) that reads something else than a ViT image embedding or "
            "hidden states; use ip-adapter_sd15 or ip-adapter-plus_sd15."
        )
    channels, embed_width = _sizes(image_proj, "proj.weight", 2)
    (width,) = _sizes(image_proj, "norm.weight", 1)
    return ProjectionConfig(embed_width=embed_width, tokens=channels // width, width=width)


def _resampler_config(image_proj: dict[str, Tensor]) -> ResamplerConfig:
    needed = ("proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight")
    missing = [name for name in needed if name not in image_proj]
    if missing:
        raise ValueError(f"This IP-Adapter Plus file is incomplete: image_proj lacks {missing}.")
    hidden, encoder_width = _sizes(image_proj, "proj_in.weight", 2)
    return ResamplerConfig(
        encoder_width=encoder_width,
        hidden=hidden,
        queries=_sizes(image_proj, "latents", 3)[1],
        width=_sizes(image_proj, "proj_out.weight", 2)[0],
        depth=len({name.split(".")[1] for name in image_proj if name.startswith("layers.")}),
        heads=_sizes(image_proj, "layers.0.0.to_q.weight", 2)[0] // HEAD_DIM,
        head_dim=HEAD_DIM,
        ff_mult=_sizes(image_proj, "layers.0.1.1.weight", 2)[0] // hidden,
    )
