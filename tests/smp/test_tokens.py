"""Image tokens: our encoder against the host's, our IP-Adapter modules against diffusers', same random
weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import comfy.clip_vision
import open_clip
import pytest
import torch
from diffusers.models.embeddings import ImageProjection as DiffusersProjection
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from safetensors.torch import save_file
from storydiffusion.smp.config import ProjectionConfig, ResamplerConfig
from storydiffusion.smp.encoder import OpenCLIPEncoder, load_open_clip
from storydiffusion.smp.image_tokens import ImageProjection, Resampler

VISION = {"image_size": 56, "layers": 3, "width": 128, "patch_size": 14}
EMBED_WIDTH = 64
MODEL_NAME = "smp-test-vit"


@pytest.fixture(scope="module")
def open_clip_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights file of a small open_clip model, whose config open_clip knows from here on."""
    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": EMBED_WIDTH, "vision_cfg": VISION, "text_cfg": text}
    (folder / f"{MODEL_NAME}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL_NAME, pretrained=None)
    with torch.no_grad():  # open_clip starts with norms and biases at one and zero, which would hide a mix-up
        for parameter in model.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def host_clip_vision(weights: Path) -> Any:
    """The host's own CLIP vision model, its weights converted by the host."""
    encoder = load_open_clip(weights, MODEL_NAME)
    state = {f"visual.{name}": tensor for name, tensor in encoder.visual.state_dict().items()}
    model = comfy.clip_vision.ClipVisionModel(
        {
            "num_hidden_layers": VISION["layers"],
            "hidden_size": VISION["width"],
            "num_attention_heads": VISION["width"] // 64,
            "intermediate_size": 4 * VISION["width"],
            "hidden_act": "gelu",
            "projection_dim": EMBED_WIDTH,
            "image_size": VISION["image_size"],
            "patch_size": VISION["patch_size"],
            "num_channels": 3,
            "model_type": "clip_vision_model",
        }
    )
    missing, _ = model.load_sd(comfy.clip_vision.convert_to_transformers(state, "visual."))
    assert not missing
    return model


@pytest.mark.parametrize("side", [56, 90, 40])
def test_encoder_gives_the_hosts_numbers_on_squares(open_clip_weights: Path, side: int) -> None:
    images = torch.rand(2, side, side, 3, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        ours = load_open_clip(open_clip_weights, MODEL_NAME)(images)
        host = host_clip_vision(open_clip_weights).encode_image(images)
    assert ours.image_embeds.shape == (2, EMBED_WIDTH)
    assert ours.hidden_states.shape == (2, 1 + 4 * 4, VISION["width"])
    for mine, theirs in [
        (ours.image_embeds, host["image_embeds"]),
        (ours.hidden_states, host["penultimate_hidden_states"]),
    ]:
        assert (mine - theirs.float()).abs().max() <= 2**-10 * theirs.abs().max()  # one fp16 rounding


def test_encoder_sees_the_centre_square(open_clip_weights: Path) -> None:
    encoder = load_open_clip(open_clip_weights, MODEL_NAME)
    wide = torch.rand(1, 56, 80, 3, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        assert torch.equal(encoder(wide).image_embeds, encoder(wide[:, :, 12:68]).image_embeds)


def test_embeddings_are_not_normalised(open_clip_weights: Path) -> None:
    encoder = load_open_clip(open_clip_weights, MODEL_NAME)
    with torch.inference_mode():
        lengths = encoder(torch.rand(3, 56, 56, 3)).image_embeds.norm(dim=-1)
    assert (lengths - 1).abs().min() > 0.1


def test_encoder_refuses_files_and_images_that_do_not_fit(open_clip_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no open_clip weights file"):
        load_open_clip(tmp_path / "absent.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"vision_model.post_layernorm.weight": torch.ones(4)}, other)
    with pytest.raises(ValueError, match="not an open_clip weights file"):
        load_open_clip(other, MODEL_NAME)
    save_file({"visual.conv1.weight": torch.ones(4)}, other)
    with pytest.raises(ValueError, match="does not fit open_clip's smp-test-vit"):
        load_open_clip(other, MODEL_NAME)
    encoder: OpenCLIPEncoder = load_open_clip(open_clip_weights, MODEL_NAME)
    with pytest.raises(ValueError, match=r"got shape \(1, 3, 56, 56\)"):
        encoder(torch.zeros(1, 3, 56, 56))


def randomise(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


DIFFUSERS_NAMES = {
    r"^latents\.weight$": "latents",
    r"^(layers\.\d+)\.0\.norm1": r"\1.ln0",
    r"^(layers\.\d+)\.0\.norm2": r"\1.ln1",
    r"^(layers\.\d+)\.0\.to_out": r"\1.attn.to_out.0",
    r"^(layers\.\d+)\.0\.(to_q|to_kv)": r"\1.attn.\2",
    r"^(layers\.\d+)\.1\.0\.": r"\1.ff.0.",
    r"^(layers\.\d+)\.1\.1\.": r"\1.ff.1.net.0.proj.",
    r"^(layers\.\d+)\.1\.3\.": r"\1.ff.1.net.2.",
}


def diffusers_resampler(ours: Resampler) -> IPAdapterPlusImageProjection:
    """diffusers' resampler with the weights of ours, under its own names."""
    config = ours.config
    theirs = IPAdapterPlusImageProjection(
        embed_dims=config.encoder_width,
        output_dims=config.width,
        hidden_dims=config.hidden,
        depth=config.depth,
        dim_head=config.head_dim,
        heads=config.heads,
        num_queries=config.queries,
        ffn_ratio=config.ff_mult,
    )
    state: dict[str, torch.Tensor] = {}
    for name, tensor in ours.state_dict().items():
        for pattern, replacement in DIFFUSERS_NAMES.items():
            name = re.sub(pattern, replacement, name)
        if "to_kv" in name:
            state[name.replace("to_kv", "to_k")], state[name.replace("to_kv", "to_v")] = tensor.chunk(2)
        else:
            state[name] = tensor[None] if name == "latents" else tensor
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize(
    "config",
    [
        ResamplerConfig(),
        ResamplerConfig(encoder_width=48, hidden=64, queries=5, width=40, depth=2, heads=2, head_dim=8),
    ],
    ids=["ip-adapter-plus", "small"],
)
def test_resampler_equals_diffusers(config: ResamplerConfig) -> None:
    ours = Resampler(config)
    randomise(ours, 5)
    states = torch.randn(2, 17, config.encoder_width, generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        mine, theirs = ours(states), diffusers_resampler(ours)(states)
    assert mine.shape == (2, config.queries, config.width)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_image_projection_equals_diffusers() -> None:
    config = ProjectionConfig()
    ours = ImageProjection(config)
    randomise(ours, 7)
    theirs = DiffusersProjection(config.embed_width, config.width, config.tokens)
    state = ours.state_dict()
    theirs.load_state_dict({name.replace("proj.", "image_embeds."): tensor for name, tensor in state.items()})
    embeds = torch.randn(3, 1, config.embed_width, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        torch.testing.assert_close(ours(embeds), theirs(embeds[:, 0]), atol=1e-5, rtol=1e-5)
        frames = ours(embeds[None])  # leading dimensions pass through
    assert frames.shape == (1, 3, 4, 768)
