"""IP-Adapter weights for SD1.5 as an SMP without a predictor: the decoder that exists today.

Read: the base kind (`image_proj.proj`: one image embedding -> 4 tokens) and Plus (`image_proj.latents`:
resampler, 16 tokens). Both were trained as decoupled cross-attention. Their unconditional rows saw a zero
embedding (base), or an image whose normalised pixels are zero, encoded (Plus).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .config import SD15_SITES, CrossAttentionSite, Interpolation, ProjectionConfig, ResamplerConfig, SMPModelConfig
from .model import SMPWeights

HEAD_DIM = 64  # of the Plus resampler; the one size that its weights do not show


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
        return dict(nested)
    return {key.removeprefix(f"{name}."): tensor for key, tensor in file.items() if key.startswith(f"{name}.")}


def _added_kv(
    ip_adapter: dict[str, Tensor], sites: Sequence[CrossAttentionSite]
) -> tuple[dict[str, Tensor], tuple[CrossAttentionSite, ...]]:
    extra = sorted({key.partition(".")[2] for key in ip_adapter} - {"to_k_ip.weight", "to_v_ip.weight"})
    if extra:
        raise ValueError(f"This is a FaceID kind of IP-Adapter (it holds {extra}); use ip-adapter_sd15 or -plus_sd15.")
    numbers = sorted({int(key.split(".")[0]) for key in ip_adapter})
    if numbers != list(range(1, 2 * len(sites), 2)):
        raise ValueError(
            f"This IP-Adapter has projections for {len(numbers)} cross-attentions, SD1.5 has {len(sites)}; "
            "an SDXL file has 70. Use an IP-Adapter made for SD1.5."
        )
    tensors, numbered = {}, []
    for position, (number, site) in enumerate(zip(numbers, sites, strict=True)):
        for part in ("k", "v"):
            key = f"{number}.to_{part}_ip.weight"
            if key not in ip_adapter:
                raise ValueError(f"This IP-Adapter file is incomplete: ip_adapter.{key} is missing.")
            tensors[f"blocks.{position}.to_{part}.weight"] = ip_adapter[key]
        numbered.append(replace(site, channels=ip_adapter[f"{number}.to_k_ip.weight"].shape[0]))
    return tensors, tuple(numbered)


def _projection_config(image_proj: dict[str, Tensor]) -> ProjectionConfig:
    if "proj.weight" not in image_proj or "norm.weight" not in image_proj:
        kind = "full-face or FaceID" if "proj.0.weight" in image_proj else "unknown"
        raise ValueError(
            f"This IP-Adapter is of a kind ({kind}) that reads something else than a ViT image embedding or "
            "hidden states; use ip-adapter_sd15 or ip-adapter-plus_sd15."
        )
    channels, embed_width = image_proj["proj.weight"].shape
    width = image_proj["norm.weight"].shape[0]
    return ProjectionConfig(embed_width=embed_width, tokens=channels // width, width=width)


def _resampler_config(image_proj: dict[str, Tensor]) -> ResamplerConfig:
    needed = ("proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight")
    missing = [name for name in needed if name not in image_proj]
    if missing:
        raise ValueError(f"This IP-Adapter Plus file is incomplete: image_proj lacks {missing}.")
    hidden = image_proj["proj_in.weight"].shape[0]
    return ResamplerConfig(
        encoder_width=image_proj["proj_in.weight"].shape[1],
        hidden=hidden,
        queries=image_proj["latents"].shape[1],
        width=image_proj["proj_out.weight"].shape[0],
        depth=1 + max(int(name.split(".")[1]) for name in image_proj if name.startswith("layers.")),
        heads=image_proj["layers.0.0.to_q.weight"].shape[0] // HEAD_DIM,
        head_dim=HEAD_DIM,
        ff_mult=image_proj["layers.0.1.1.weight"].shape[0] // hidden,
    )
