"""SD1.5 in diffusers' folder layout, open_clip weights and videos, all of them random and small."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

CLIP_MODEL = "smp-tiny-clip"
CLIP_EMBED_WIDTH = 24
TEXT_WIDTH = 32
UNET_WIDTHS = (32, 32)


def write_sd15(folder: Path) -> None:
    """Write unet/, vae/, text_encoder/ and tokenizer/ (letters, no merges)."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        block_out_channels=UNET_WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "<|endoftext|>"]
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": words[0], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**special, "model_max_length": 77}))


def write_open_clip(folder: Path) -> Path:
    """Write weights of a small open_clip model, which open_clip knows as `CLIP_MODEL` from here on."""
    vision = {"image_size": 28, "layers": 2, "width": 64, "patch_size": 14, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": CLIP_EMBED_WIDTH, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{CLIP_MODEL}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    path = folder / "open_clip.safetensors"
    save_file(open_clip.create_model(CLIP_MODEL, pretrained=None).state_dict(), path)
    return path


def write_video(path: Path, frames: int, *, seed: int = 0, size: int = 48, title: str = "") -> None:
    """Write a bright square that crosses a dark picture."""
    shade = np.random.default_rng(seed).integers(20, 120, 3)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = size + 16, size, "yuv420p"
        for number in range(frames):
            picture = np.full((size, size + 16, 3), shade, dtype=np.uint8)
            left = number * size // frames
            picture[size // 3 : 2 * size // 3, left : left + 16] = 240
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
