"""The toy model is a genuine MODEL, CLIP and VAE: stock nodes work on it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import comfy.utils
import nodes as host_nodes
import pytest
import torch
from storydiffusion.devtools.toy import model as toy
from storydiffusion.devtools.toy.examples import encode
from storydiffusion.devtools.toy.text_encoder import weights
from storydiffusion.nodes.host.unet import blocks_with_attention

LOADER = Path(toy.__file__).parent / "custom_node" / "__init__.py"


@pytest.fixture(scope="module")
def loaded() -> Any:
    return toy.load()


def test_weights_are_the_ones_described_beside_them() -> None:
    beside = json.loads(toy.WEIGHTS.with_suffix(".json").read_text())
    content = toy.WEIGHTS.read_bytes()
    assert len(content) <= 12_000_000
    assert hashlib.sha256(content).hexdigest() == beside["sha256"]
    assert int(beside["samples"]) > 0
    assert "storydiffusion.devtools.toy.train" in beside["command"]


def test_attention_sits_on_two_levels_of_encoder_middle_and_decoder(loaded: Any) -> None:
    blocks = blocks_with_attention(loaded[0].model.diffusion_model)
    assert {(block.key[0], block.downsampling) for block in blocks} == {
        ("input", 2),
        ("input", 4),
        ("middle", 4),
        ("output", 2),
        ("output", 4),
    }


def test_stock_sampler_and_vae_draw_pixel_art(loaded: Any) -> None:
    model, clip, vae = loaded
    encoder = host_nodes.CLIPTextEncode()
    positive, negative = (encoder.encode(clip, text)[0] for text in ("a man waves by the sea", ""))
    (latent,) = host_nodes.EmptyLatentImage().generate(256, 256, 2)
    arguments = (1, 2, 5.0, "ddim", "ddim_uniform", positive, negative, latent)
    first, second = (host_nodes.KSampler().sample(model, *arguments)[0]["samples"] for _ in range(2))
    assert first.shape == (2, 4, 32, 32)
    assert torch.equal(first, second)
    image = host_nodes.VAEDecode().decode(vae, {"samples": first})[0]
    assert image.shape == (2, 256, 256, 3)
    squares = image.unflatten(1, (32, 8)).unflatten(3, (32, 8))
    assert torch.equal(squares, squares[:, :, :1, :, :1].expand_as(squares))
    # Red, green and blue come back; the fourth channel is made from them anew.
    again = vae.encode(image)
    assert torch.allclose(again[:, :3], first[:, :3].clamp(-1, 1), atol=1e-5)


def test_prompts_are_encoded_as_the_stock_node_does(loaded: Any) -> None:
    clip = loaded[1]
    texts = ["a man with a red hat", "a woman jumps"]
    pooled = encode(clip, texts)
    for row, text in enumerate(texts):
        ((stock, _),) = host_nodes.CLIPTextEncode().encode(clip, text)[0]
        assert stock.shape == (1, 77, 256)
        assert torch.allclose(pooled[row].float(), stock[0], atol=2e-3)


def test_text_encoder_comes_from_its_seed_alone() -> None:
    first, again, other = weights(), weights(), weights(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "text_model.embeddings.token_embedding.weight"
    assert not torch.equal(first[name], other[name])


def test_a_word_is_read_with_the_words_before_it(loaded: Any) -> None:
    """The state at "hat" must tell which colour stood before it, whatever the rest of the prompt."""
    clip = loaded[1]
    rows = encode(
        clip, [f"a man with a {colour} hat {rest}" for rest in ("waves", "jumps") for colour in ("red", "blue")]
    )
    red, blue, red_again, blue_again = rows[:, 6].float()
    assert torch.equal(red, red_again)
    assert torch.equal(blue, blue_again)
    assert (red - blue).norm() > 0.3 * red.norm()


def test_loader_node_as_the_host_loads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("toy_loader_pack", LOADER)
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    try:
        schema = pack.StoryToyLoader.GET_SCHEMA()
        assert [output.io_type for output in schema.outputs] == ["MODEL", "CLIP", "VAE"]
        model, clip, vae = pack.StoryToyLoader.execute().result
    finally:
        for name in [name for name in sys.modules if name.startswith("storydiffusion_toy")]:
            monkeypatch.delitem(sys.modules, name)
    stored = comfy.utils.load_torch_file(str(toy.WEIGHTS), safe_load=True)
    held = model.model.diffusion_model.state_dict()
    assert stored.keys() == held.keys()
    assert all(torch.equal(held[name], stored[name].float()) for name in stored)
    assert clip.tokenize("a man")["l"]
    assert vae.spacial_compression_encode() == 8


def test_weights_of_another_unet_are_refused() -> None:
    state = comfy.utils.load_torch_file(str(toy.WEIGHTS), safe_load=True)
    state.pop("out.2.weight")
    with pytest.raises(ValueError, match=r"out\.2\.weight"):
        toy.load_model(state)
