"""The small checkpoints are what the stock loader takes for SD1.5 and SDXL, and the same on every machine."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.supported_models
import nodes
import pytest
import torch
from safetensors.torch import load_file
from storydiffusion.devtools.tiny.seeded_weights import (
    ensure_file,
    seeded_tensor,
    write_safetensors,
    zeros_without_memory,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_fixture", "family", "width"),
    [
        ("tiny_sd15_file", comfy.supported_models.SD15, 768),
        ("tiny_sdxl_file", comfy.supported_models.SDXL, 2048),
    ],
)
def test_stock_loader_finds_every_key(
    file_fixture: str,
    family: type,
    width: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path: Path = request.getfixturevalue(file_fixture)
    monkeypatch.setattr("folder_paths.get_full_path_or_raise", lambda folder, name: str(path))
    with caplog.at_level(logging.INFO):
        model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(path.name)
    assert not [text for text in caplog.messages if "missing" in text or "no CLIP" in text]
    assert isinstance(model.model.model_config, family)
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a man with a red cap"))
    assert conditioning[0][0].shape == (1, 77, width)
    assert conditioning[0][0].isfinite().all()
    image = vae.decode(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert image.shape == (1, 64, 64, 3)
    assert 0.05 < image.std() < 0.5


def test_prompts_make_a_difference(tiny_sd15: tuple) -> None:
    _, clip, _ = tiny_sd15
    red, blue = (clip.encode(text) for text in ("a red cap", "a blue cap"))
    assert (red - blue).norm() / red.norm() > 0.05


def test_a_tensor_depends_on_its_name_and_seed_alone() -> None:
    assert torch.equal(seeded_tensor("a.weight", (64, 32), 0), seeded_tensor("a.weight", (64, 32), 0))
    assert not torch.equal(seeded_tensor("a.weight", (64, 32), 0), seeded_tensor("b.weight", (64, 32), 0))
    assert not torch.equal(seeded_tensor("a.weight", (64, 32), 0), seeded_tensor("a.weight", (64, 32), 1))
    assert seeded_tensor("conv.weight", (64, 32, 3, 3), 0).std() == pytest.approx((32 * 9) ** -0.5, rel=0.05)
    assert seeded_tensor("norm.weight", (8,), 0).eq(1).all()
    assert seeded_tensor("norm.bias", (8,), 0).eq(0).all()


def test_written_file_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0, dtype=torch.float16),
        "hole": zeros_without_memory((512, 1024)),
        "matrix": torch.randn(5, 3).half(),
        "transposed": torch.randn(4, 6).T,
        "zero": torch.zeros(2, 2),
        "last hole": zeros_without_memory((3, 3)),
    }
    path = tmp_path / "file.safetensors"
    write_safetensors(path, tensors, {"recipe": "x"})
    read = load_file(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_file_is_written_once_per_recipe_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    assert ensure_file(path, "one", lambda: {"a": torch.ones(2)})
    assert not ensure_file(path, "one", lambda: pytest.fail("made again"))
    assert ensure_file(path, "two", lambda: {"a": torch.zeros(2)})
    path.write_bytes(path.read_bytes()[:20])
    assert ensure_file(path, "two", lambda: {"a": torch.zeros(2)})

    complete = path.read_bytes()
    with pytest.raises(KeyError):
        ensure_file(path, "three", lambda: {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bool)})
    assert path.read_bytes() == complete
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == [path.name]
