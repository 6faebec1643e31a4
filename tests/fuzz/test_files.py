"""Damaged files of weights: motion modules, SMP checkpoints, IP-Adapters. They load, or the error names the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from storydiffusion.devtools.tiny.motion import motion_config, motion_tensors
from storydiffusion.nodes.animatediff.loader import load_motion_module
from storydiffusion.nodes.motion_predictor.loading import IP_ADAPTER_FOLDER, NO_FILE, SMP_FOLDER, load_smp, smp_source
from storydiffusion.smp.checkpoint import load_checkpoint, save_checkpoint
from storydiffusion.smp.config import (
    SD15_SITES,
    CrossAttentionSite,
    ProjectionConfig,
    ResamplerConfig,
    SMPConfig,
    SMPModelConfig,
)
from storydiffusion.smp.image_tokens import ImageProjection, Resampler
from storydiffusion.smp.injection import AddedKV
from storydiffusion.smp.model import SemanticMotion
from storydiffusion.tests.helpers.fuzzing import examples, readable

Change = Callable[[dict[Any, Any]], None]

MOTION = motion_tensors(motion_config((32, 32), res_blocks=1, max_frames=8), dtype=torch.float32)
RESAMPLER = ResamplerConfig(encoder_width=12, hidden=8, queries=3, width=16, depth=1, heads=1)
DTYPES = [torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool, torch.complex64]
SHAPES = [
    (),
    (0,),
    (1,),
    (32,),
    (33,),
    (8, 32),
    (1, 0, 32),
    (2, 8, 32),
    (0, 8),
    (8, 0),
    (64, 64, 1, 1),
    (1, 1, 1, 1, 1),
]
HUGE = [(2**17,), (2**40,), (2**20, 2**20), (1, 2**40, 32), (2**60, 4)]
NAMES = [
    "",
    ".",
    "down_blocks.9.motion_modules.0.norm.weight",
    "up_blocks.0.motion_modules.7.norm.weight",
    "1.x.weight",
]
NAMES += [
    "mid_block.motion_modules.0.",
    "down_blocks." + "9" * 4500 + ".motion_modules.0.norm.weight",
    "image_proj.layers.x",
]
NAMES += [
    "ip_adapter.x.to_k_ip.weight",
    "ip_adapter.",
    "image_proj",
    "motion.",
    "added_kv.blocks.99.to_k.weight",
    "a.lora.b",
]


def is_small(value: Any) -> bool:
    """Whether it is a tensor, and none of HUGE, which no memory holds."""
    return isinstance(value, torch.Tensor) and value.numel() < 2**20


@st.composite
def changes(draw: st.DrawFn, pickled: bool) -> Change:
    """One change to named weights; files that are pickled can hold more than safetensors."""
    where, name = draw(st.integers(0, 10**6)), draw(st.sampled_from(NAMES) | st.text(max_size=6))
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    kinds = ["drop", "rename", "add", "shape", "dtype", "all dtypes", "nan", "only"]
    kind = draw(st.sampled_from([*kinds, "huge", "no tensor", "number as name", "nested"] if pickled else kinds))
    huge = draw(st.sampled_from(HUGE))
    everywhere = draw(st.booleans())

    def change(weights: dict[Any, Any]) -> None:
        if not weights:
            return
        key = sorted(weights, key=str)[where % len(weights)]
        ending = str(key).rpartition(".")[2]
        alike = [other for other in weights if str(other).endswith(ending)] if everywhere else [key]
        if kind == "only":
            for other in set(weights) - {key}:
                del weights[other]
        elif kind == "drop":
            for other in alike:
                del weights[other]
        elif kind == "rename":
            weights[name] = weights.pop(key)
        elif kind == "number as name":
            weights[where] = weights.pop(key)
        elif kind == "nested":
            weights[key] = {name: weights[key]}
        elif kind == "all dtypes":
            weights.update({k: v.to(dtype) for k, v in weights.items() if is_small(v)})
        else:
            new: dict[str, Callable[[torch.Tensor], Any]] = {
                "shape": lambda _: torch.zeros(shape),
                "huge": lambda _: torch.zeros(()).expand(huge),
                "dtype": lambda old: old.to(dtype),
                "nan": lambda old: torch.full_like(old.float(), float("nan")),
                "no tensor": lambda _: [1, "x"],
            }
            if kind == "add":
                weights[name] = torch.zeros(shape)
            else:
                weights.update({k: new[kind](weights[k]) for k in alike if is_small(weights[k])})

    return change


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change to the bytes of a file: none most of the time, or cut, or with other bytes in its header."""
    kind = draw(st.sampled_from(["none", "none", "cut", "cut in the header", "header", "length", "appended"]))
    where, new = draw(st.floats(0, 1, allow_subnormal=False)), draw(st.binary(min_size=1, max_size=8))

    def damage(data: bytes) -> bytes:
        header = 8 + int.from_bytes(data[:8], "little")
        place = int(where * (len(data) if kind == "cut" else min(header, len(data))))
        if kind.startswith("cut"):
            return data[:place]
        if kind == "header":
            return data[:place] + new + data[place + len(new) :]
        if kind == "length":
            return new.ljust(8, b"\0") + data[8:]
        return data + new if kind == "appended" else data

    return damage


def written(
    path: Path, weights: dict[Any, Any], damage: Callable[[bytes], bytes], metadata: dict[str, str] | None
) -> None:
    if path.suffix == ".safetensors":
        tensors = {key: tensor.contiguous().clone() for key, tensor in weights.items()}
        path.write_bytes(damage(save(tensors, metadata=metadata)))
    else:
        torch.save(weights, path)
        path.write_bytes(damage(path.read_bytes()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that is the host's for SMPs and for IP-Adapters."""
    path = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        for name in (SMP_FOLDER, IP_ADAPTER_FOLDER):
            patch.setitem(folder_paths.folder_names_and_paths, name, ([str(path)], {".safetensors", ".bin"}))
        yield path


any_file = st.booleans().flatmap(lambda pickled: st.tuples(st.just(pickled), st.lists(changes(pickled), max_size=3)))


def changed(weights: dict[str, torch.Tensor], all_changes: list[Change]) -> dict[Any, Any]:
    result: dict[Any, Any] = dict(weights)
    for change in all_changes:
        change(result)
    return result


@examples(22)
@given(any_file, damages())
def test_motion_modules(folder: Path, file: tuple[bool, list[Change]], damage: Callable[[bytes], bytes]) -> None:
    path = folder / ("module.ckpt" if file[0] else "module.safetensors")
    written(path, changed(MOTION, file[1]), damage, None)
    loaded = readable(lambda: load_motion_module(str(path)), path.name)
    if loaded is not None:
        config = loaded.model.config
        assert len(loaded.model.down_blocks) == len(config.down)
        assert 0 < config.max_frames == loaded.model.state_dict()[encoding(loaded.model)].shape[0]


def encoding(module: torch.nn.Module) -> str:
    return next(key for key in module.state_dict() if key.endswith("pos_encoder.weight"))


@pytest.fixture(scope="module")
def smp(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights and metadata of a small SMP."""
    sites = (CrossAttentionSite("input", 1, 0, 8), CrossAttentionSite("middle", 0, 0, 16))
    predictor = SMPConfig(tokens=3, width=16, hidden=16, layers=2, heads=2, head_dim=4, max_frames=8)
    config = SMPModelConfig("resampled", 12, sites, "concat", "zero", predictor, resampler=RESAMPLER)
    path = tmp_path_factory.mktemp("smp") / "smp.safetensors"
    save_checkpoint(path, SemanticMotion(config), AddedKV(sites, 16))
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata())


numbers = st.sampled_from([0, -1, 1, 3, 2**20, 2**31, 2**62, 10**30, 1.5, float("nan"), float("inf"), True])
json_values = numbers | st.sampled_from([None, "x", "", [], {}, [1], [{}], {"a": 1}, [[]]]) | st.text(max_size=4)


@st.composite
def configs(draw: st.DrawFn) -> Callable[[str], str]:
    """A change to a config as JSON: an entry at any depth has another value, or is gone; or the text is none at all."""
    where, value = draw(st.integers(0, 10**6)), draw(json_values)
    kind = draw(st.sampled_from(["same", "set", "set", "set", "drop", "add", "whole", "text"]))
    text = draw(st.sampled_from(["", "{", "[" * 50_000, "1" * 5000, "NaN", '{"a":1}', "\0"]) | st.text(max_size=5))

    def change(config: str) -> str:
        if kind == "text":
            return text
        if kind == "whole":
            return json.dumps(value)
        data = json.loads(config)
        entries = [(data, key) for key in data]
        for part in (data["predictor"], data["resampler"], *data["sites"]):
            entries += [(part, key) for key in part]
        part, key = entries[where % len(entries)]
        if kind == "set":
            part[key] = value
        elif kind == "drop":
            del part[key]
        elif kind == "add":
            part[key + "x"] = value
        return json.dumps(data)

    return change


@examples(16)
@given(st.lists(changes(False), max_size=1), configs(), damages())
def test_smp_checkpoints(
    folder: Path,
    smp: tuple[dict[str, torch.Tensor], dict[str, str]],
    weights: list[Change],
    config: Callable[[str], str],
    damage: Callable[[bytes], bytes],
) -> None:
    path = folder / "smp.safetensors"
    metadata = {**smp[1], "config": config(smp[1]["config"])}
    written(path, changed(smp[0], weights), damage, metadata)
    loaded = readable(lambda: load_smp(*smp_source(path.name, NO_FILE)), path.name)
    if loaded is not None:
        assert loaded.config == load_checkpoint(path).config


def ip_adapter(plus: bool) -> dict[str, torch.Tensor]:
    """A small IP-Adapter under its published names."""
    part = Resampler(RESAMPLER) if plus else ImageProjection(ProjectionConfig(embed_width=12, tokens=2, width=16))
    weights = {f"image_proj.{key}": tensor for key, tensor in part.state_dict().items()}
    if plus:
        weights["image_proj.latents"] = weights.pop("image_proj.latents.weight")[None]
    for number in range(1, 2 * len(SD15_SITES), 2):
        weights |= {f"ip_adapter.{number}.to_{name}_ip.weight": torch.ones(8, 16) for name in "kv"}
    return weights


def nested(weights: dict[Any, Any]) -> dict[Any, Any]:
    """The layout of a `.bin` file."""
    sections: dict[Any, Any] = {}
    for name, tensor in weights.items():
        section, dot, rest = str(name).partition(".")
        if dot and isinstance(sections.setdefault(section, {}), dict):
            sections[section][rest] = tensor
        else:
            sections[name] = tensor
    return sections


@examples(13)
@given(st.booleans(), st.booleans(), any_file, damages())
def test_ip_adapters(
    folder: Path, plus: bool, in_sections: bool, file: tuple[bool, list[Change]], damage: Callable[[bytes], bytes]
) -> None:
    path = folder / ("adapter.bin" if file[0] else "adapter.safetensors")
    weights = changed(ip_adapter(plus), file[1])
    written(path, nested(weights) if file[0] and in_sections else weights, damage, None)
    loaded = readable(lambda: load_smp(*smp_source("interpolation (linear)", path.name)), path.name)
    if loaded is not None:
        assert len(loaded.config.sites) == len(SD15_SITES)


def test_the_files_load_as_they_are(folder: Path, smp: tuple[dict[str, torch.Tensor], dict[str, str]]) -> None:
    """What is damaged above is whole to begin with."""
    save_file(MOTION, folder / "whole.safetensors")
    assert load_motion_module(str(folder / "whole.safetensors")).model.config.max_frames == 8
    save_file(smp[0], folder / "whole.safetensors", metadata=smp[1])
    assert load_smp(*smp_source("whole.safetensors", NO_FILE)).config.resampler == RESAMPLER
    for plus in (False, True):
        save_file(ip_adapter(plus), folder / "whole.safetensors")
        assert load_smp(*smp_source("interpolation (linear)", "whole.safetensors")).config.sites[0].channels == 8
        torch.save(nested(ip_adapter(plus)), folder / "whole.bin")
        assert load_smp(*smp_source("interpolation (linear)", "whole.bin")).config.sites[0].channels == 8
