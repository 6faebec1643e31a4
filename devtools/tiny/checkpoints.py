"""Small checkpoints with random weights that the stock loader accepts as SD1.5 and as SDXL.

Every tensor has the name that a published checkpoint gives it, and the host itself says which there are: its
own modules are built on the meta device. The UNets have the real channel and head sizes and few blocks; the
text encoders are full-size, because the stock loader takes no other, with the layers between the first and
the last left at zero, which makes them identities and holes in the file.

Run as a module it writes all of them into one folder: `storydiffusion.devtools.tiny.checkpoints FOLDER`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.taesd.taesd
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .seeded_weights import ensure_file, parameter_shapes, seeded_state_dict, seeded_tensor, zeros_without_memory

VAE_PREFIX = "first_stage_model."
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TinyCheckpoint:
    """What one checkpoint file holds: `family` is the host's class, which knows the published key names."""

    file_name: str
    family: type
    text_encoder: type
    unet: Mapping[str, Any]
    seed: int = 0
    text_encoder_layers: Mapping[str, int] = field(default_factory=dict)


_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
}

TINY_SD15 = TinyCheckpoint(
    file_name="tiny_sd15.safetensors",
    family=comfy.supported_models.SD15,
    text_encoder=comfy.sd1_clip.SD1ClipModel,
    unet={
        **_UNET,
        "context_dim": 768,
        "num_heads": 8,
        "use_linear_in_transformer": False,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 1],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
    },
    text_encoder_layers={"cond_stage_model.": 12},
)

# The host knows these depths as KOALA 700M, a distilled SDXL, and treats it as SDXL in every respect.
TINY_SDXL = TinyCheckpoint(
    file_name="tiny_sdxl.safetensors",
    family=comfy.supported_models.KOALA_700M,
    text_encoder=comfy.sdxl_clip.SDXLClipModel,
    unet={
        **_UNET,
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "num_heads": -1,
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 1, 1],
        "transformer_depth": [0, 2, 5],
        "transformer_depth_output": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
    },
    text_encoder_layers={"conditioner.embedders.0.": 12, "conditioner.embedders.1.": 32},
)

ALL = (TINY_SD15, TINY_SDXL)


def checkpoint_shapes(checkpoint: TinyCheckpoint) -> Shapes:
    """Return name and shape of every tensor of the file, under the names published checkpoints use."""
    unet = UNetModel(**checkpoint.unet, device="meta", operations=comfy.ops.disable_weight_init)
    with torch.device("meta"):
        text_encoder = checkpoint.text_encoder(device="meta", dtype=torch.float16)
    vae = comfy.taesd.taesd.TAESD()
    family = checkpoint.family(dict(checkpoint.unet))
    text_keys = family.process_clip_state_dict_for_saving(text_encoder.state_dict())
    text_shapes = {key: tuple(value.shape) for key, value in text_keys.items() if not key.endswith("position_ids")}
    return {
        **parameter_shapes(unet, "model.diffusion_model."),
        **text_shapes,
        **parameter_shapes(vae, VAE_PREFIX),
    }


def make_tensors(checkpoint: TinyCheckpoint) -> dict[str, torch.Tensor]:
    """Return all tensors of the checkpoint in float16."""
    return {key: _tensor(checkpoint, key, shape) for key, shape in checkpoint_shapes(checkpoint).items()}


def _tensor(checkpoint: TinyCheckpoint, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    if key == VAE_PREFIX + "vae_scale":
        return torch.ones(shape, dtype=torch.float16)
    if key == VAE_PREFIX + "vae_shift" or _is_hollow_layer(checkpoint, key):
        return zeros_without_memory(shape)
    return seeded_tensor(key, shape, checkpoint.seed).half()


def _is_hollow_layer(checkpoint: TinyCheckpoint, key: str) -> bool:
    """Tell whether the key belongs to a text encoder's layer that is neither its first nor its last."""
    for prefix, layers in checkpoint.text_encoder_layers.items():
        for marker in (".encoder.layers.", ".transformer.resblocks."):
            if key.startswith(prefix) and marker in key:
                return 0 < int(key.split(marker)[1].split(".")[0]) < layers - 1
    return False


def ensure_checkpoint(checkpoint: TinyCheckpoint, folder: Path) -> Path:
    """Write the checkpoint into `folder` unless it is there already, made by this very recipe."""
    path = folder / checkpoint.file_name
    recipe = repr(checkpoint) + Path(__file__).read_text(encoding="utf-8")
    if ensure_file(path, recipe, lambda: make_tensors(checkpoint)):
        print(f"wrote {path}")
    return path


def ensure_dit(folder: Path) -> Path:
    """Write a small diffusion transformer (SD3, no text encoder), which the pack has to refuse."""
    path = folder / "tiny_sd3.safetensors"
    sizes = {"depth": 2, "in_channels": 16, "adm_in_channels": 64, "pos_embed_max_size": 16}
    context = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}
    transformer = OpenAISignatureMMDITWrapper(
        input_size=None,
        **sizes,
        context_embedder_config=context,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    shapes = parameter_shapes(transformer)
    ensure_file(path, repr(shapes), lambda: seeded_state_dict(shapes, seed=0))
    return path


def main() -> None:
    folder = Path(sys.argv[1])
    for checkpoint in ALL:
        ensure_checkpoint(checkpoint, folder)


if __name__ == "__main__":
    main()
