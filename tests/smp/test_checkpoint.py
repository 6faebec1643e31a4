"""SMP checkpoints and IP-Adapter files: what is read, what is written, and what is refused with which
words."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from storydiffusion.devtools.tiny.smp import TINY_BASE, TINY_PLUS, ip_adapter_tensors
from storydiffusion.smp.checkpoint import load_checkpoint, save_checkpoint
from storydiffusion.smp.config import (
    SD15_SITES,
    CrossAttentionSite,
    ProjectionConfig,
    ResamplerConfig,
    SMPConfig,
    SMPModelConfig,
)
from storydiffusion.smp.injection import AddedKV
from storydiffusion.smp.ip_adapter import load_ip_adapter
from storydiffusion.smp.model import SemanticMotion

SITES = (CrossAttentionSite("input", 1, 0, 24), CrossAttentionSite("middle", 0, 1, 48))
PREDICTOR = SMPConfig(tokens=5, width=20, hidden=16, layers=2, heads=2, head_dim=4, max_frames=8, pin_ends=True)
RESAMPLER = ResamplerConfig(encoder_width=28, hidden=24, queries=5, width=20, depth=1, heads=2, head_dim=4)
CONFIG = SMPModelConfig(
    token_space="resampled",
    encoder_width=28,
    sites=SITES,
    guidance="concat",
    uncond="zero",
    predictor=PREDICTOR,
    resampler=RESAMPLER,
)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, SemanticMotion, AddedKV]:
    """A small SMP with a UNet of other channels than SD1.5's, and the checkpoint written from it."""
    torch.manual_seed(0)
    motion, added_kv = SemanticMotion(CONFIG), AddedKV(SITES, 20)
    for parameter in [*motion.parameters(), *added_kv.parameters()]:
        torch.nn.init.normal_(parameter)
    path = tmp_path / "small.safetensors"
    save_checkpoint(path, motion, added_kv)
    return path, motion, added_kv


def rewrite(path: Path, *, metadata: dict[str, str] | None = None, drop: str = "", add: str = "") -> None:
    """Change a checkpoint on disk: metadata entries, one tensor less, one more."""
    with safe_open(path, framework="pt") as file:
        entries = dict(file.metadata())
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    if add:
        tensors[add] = torch.zeros(1)
    save_file(tensors, path, metadata=entries | (metadata or {}))


def test_a_checkpoint_comes_back_as_it_was(saved: tuple[Path, SemanticMotion, AddedKV]) -> None:
    path, motion, added_kv = saved
    weights = load_checkpoint(path)
    assert weights.config == CONFIG
    loaded_motion, loaded_kv = weights.load()
    start, end = torch.randn(1, 9, 28), torch.randn(1, 9, 28)

    def run(module: SemanticMotion, kv: AddedKV) -> list[torch.Tensor]:
        tokens = module.transition(module.tokens(start), module.tokens(end), 4)
        return [tokens, *kv(0, tokens[:, 0]), *kv(1, tokens[:, 0])]

    for mine, theirs in zip(run(motion, added_kv), run(loaded_motion, loaded_kv), strict=True):
        assert torch.equal(mine, theirs)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    saved: tuple[Path, SemanticMotion, AddedKV],
) -> None:
    path, motion, added_kv = saved
    before = path.read_bytes()
    assert motion.predictor is not None
    motion.predictor.proj_in.weight = torch.nn.Parameter(  # a tensor that cannot be written
        torch.empty(motion.predictor.proj_in.weight.shape, device="meta")
    )
    with pytest.raises(Exception, match="meta"):
        save_checkpoint(path, motion, added_kv)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="Windows has neither these permissions nor the need to sync a folder")
def test_a_checkpoint_is_on_disk_and_may_be_read_as_any_new_file(
    saved: tuple[Path, SemanticMotion, AddedKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, motion, added_kv = saved
    synced: list[int] = []
    sync = os.fsync

    def watched(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    before = os.umask(0o027)
    try:
        save_checkpoint(path, motion, added_kv)
    finally:
        os.umask(before)
    assert synced == [path.stat().st_ino, path.parent.stat().st_ino]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(
    saved: tuple[Path, SemanticMotion, AddedKV],
) -> None:
    path, _, _ = saved
    original = path.read_bytes()
    config = CONFIG.to_dict()

    def predictor(**entries: object) -> dict:
        return {"metadata": {"config": json.dumps(config | {"predictor": config["predictor"] | entries})}}

    def site(**entries: object) -> dict:
        return {"metadata": {"config": json.dumps(config | {"sites": [config["sites"][0] | entries]})}}

    small = config | {"predictor": config["predictor"] | {"width": 19}}
    cases: list[tuple[dict, str]] = [
        ({"metadata": {"format": "lora"}}, r"small.safetensors cannot be used .* some other kind of file"),
        ({"metadata": {"format_version": "2"}}, "format version is '2'; this pack reads version 1"),
        ({"metadata": {"config": "{"}}, "no readable config"),
        ({"metadata": {"config": json.dumps(small)}}, r"predictor works on tokens of shape \(5, 19\)"),
        ({"metadata": {"config": json.dumps(config | {"speed": 1})}}, r"no entries named \['speed'\]"),
        ({"metadata": {"config": json.dumps(config | {"predictor": None})}}, "has no predictor"),
        ({"metadata": {"config": json.dumps({"token_space": "resampled"})}}, "SMPModelConfig is incomplete"),
        ({"metadata": {"config": "5"}}, "has 5 where the entries of SMPModelConfig should be"),
        ({"metadata": {"config": "[" * 100_000}}, "no readable config: RecursionError"),
        ({"metadata": {"config": json.dumps(config | {"sites": 5})}}, "has 5 where the list of sites should be"),
        ({"metadata": {"config": json.dumps(config | {"resampler": 5})}}, "5 where the entries of ResamplerConfig"),
        (predictor(hidden=1.5), r"SMPConfig.hidden is 1\.5; it must be a whole number"),
        (predictor(heads=True), "SMPConfig.heads is True; it must be a whole number"),
        (predictor(residual=1), "SMPConfig.residual is 1; it must be true or false"),
        (predictor(hidden=2**40), "SMPConfig.hidden is 1099511627776; it must lie between 1 and 1048576"),
        (predictor(layers=1_000_000), r"1000001 layers, but the file holds no more than \d+ tensors"),
        (site(channels=0), "CrossAttentionSite.channels is 0; it must lie between 1"),
        (site(number=-1), "CrossAttentionSite.number is -1; it must lie between 0"),
        (site(block=[]), r"CrossAttentionSite.block is \[\]; it must be a text"),
        ({"drop": "added_kv.blocks.1.to_v.weight"}, r"added_kv.blocks.1.to_v.weight \(48, 20\) is missing"),
        ({"add": "motion.predictor.extra"}, r"motion.predictor.extra \(1,\) does not belong here"),
        ({"add": "unet.weight"}, "'unet.weight' that belongs to no part"),
    ]
    for change, message in cases:
        path.write_bytes(original)
        rewrite(path, **change)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path)
    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(ValueError, match=r"small.safetensors is not a readable safetensors file"):
        load_checkpoint(path)


def test_a_tensor_of_another_shape_is_refused(saved: tuple[Path, SemanticMotion, AddedKV]) -> None:
    path, _, _ = saved
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors["added_kv.blocks.0.to_k.weight"] = torch.zeros(24, 21)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"to_k.weight is \(24, 21\), its config says \(24, 20\)"):
        load_checkpoint(path)


def test_interpolation_is_not_saved_as_an_smp(tmp_path: Path) -> None:
    motion, added_kv = load_ip_adapter(ip_adapter_tensors(TINY_BASE, torch.float32)).load()
    with pytest.raises(ValueError, match="Only an SMP with a predictor is saved"):
        save_checkpoint(tmp_path / "x.safetensors", motion, added_kv)
    assert not list(tmp_path.iterdir())


def test_configs_whose_parts_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="token_space is 'pixels'"):
        SMPModelConfig("pixels", 4, SITES, "concat", "zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resampler if and only if"):
        SMPModelConfig("resampled", 28, SITES, "concat", "zero")
    with pytest.raises(ValueError, match="resampler reads width 28, not 30"):
        SMPModelConfig("resampled", 30, SITES, "concat", "zero", resampler=RESAMPLER)
    with pytest.raises(ValueError, match="one token of width 1024"):
        SMPModelConfig("image_embeds", 768, SITES, "concat", "zero", projection=ProjectionConfig())
    with pytest.raises(ValueError, match="sites is empty"):
        SMPModelConfig("image_embeds", 768, (), "concat", "zero")


def test_added_projections_start_at_zero() -> None:
    keys, values = AddedKV(SITES, 20)(1, torch.randn(2, 5, 20))
    assert keys.shape == values.shape == (2, 5, 48)
    assert not keys.any()
    assert not values.any()


def test_sd15_sites_are_the_16_cross_attentions_in_file_order() -> None:
    assert [(site.block, site.number, site.channels) for site in SD15_SITES] == [
        *[("input", n, c) for n, c in ((1, 320), (2, 320), (4, 640), (5, 640), (7, 1280), (8, 1280))],
        *[("output", n, 1280) for n in (3, 4, 5)],
        *[("output", n, 640) for n in (6, 7, 8)],
        *[("output", n, 320) for n in (9, 10, 11)],
        ("middle", 0, 1280),
    ]


def test_names_that_are_no_text_are_no_weights() -> None:
    tensors = ip_adapter_tensors(TINY_BASE, torch.float32)
    sections = nest(tensors)
    noise: dict = {**sections, "image_proj": {**sections["image_proj"], 3: torch.zeros(1)}, 4: torch.zeros(1)}
    assert load_ip_adapter(noise).config == load_ip_adapter(tensors).config


@pytest.mark.parametrize("nested", [False, True])
def test_ip_adapter_base_is_four_tokens_from_one_embedding(nested: bool) -> None:
    tensors = ip_adapter_tensors(TINY_BASE, torch.float32)
    weights = load_ip_adapter(nest(tensors) if nested else tensors)
    assert weights.config.token_space == "image_embeds"
    assert (weights.config.token_shape, weights.config.output_shape) == ((1, 1024), (4, 768))
    assert (weights.config.guidance, weights.config.uncond) == ("decoupled", "zero")
    assert weights.config.sites[-1] == CrossAttentionSite("middle", 0, 0, 320)
    motion, added_kv = weights.load()
    frames = motion.transition(torch.randn(2, 1, 1024), torch.randn(2, 1, 1024), 3)
    assert frames.shape == (2, 3, 4, 768)
    keys, _ = added_kv(15, frames[0])
    torch.testing.assert_close(keys, frames[0] @ tensors["ip_adapter.31.to_k_ip.weight"].T)


def test_ip_adapter_plus_is_sixteen_resampled_tokens() -> None:
    tensors = ip_adapter_tensors(TINY_PLUS, torch.float32)
    weights = load_ip_adapter(tensors, interpolation="spherical")
    assert weights.config.resampler == ResamplerConfig()
    assert weights.config.token_shape == weights.config.output_shape == (16, 768)
    assert (weights.config.encoder_width, weights.config.uncond) == (1280, "blank_image")
    assert weights.config.interpolation == "spherical"
    motion, _ = weights.load()
    assert motion.resampler is not None
    assert torch.equal(motion.resampler.latents.weight, tensors["image_proj.latents"][0])
    assert motion.tokens(torch.randn(1, 17, 1280)).shape == (1, 16, 768)


def nest(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The layout of a `.bin` file."""
    sections: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        section, _, rest = name.partition(".")
        sections.setdefault(section, {})[rest] = tensor
    return sections


def test_other_ip_adapters_are_refused_and_named() -> None:
    base, plus = ip_adapter_tensors(TINY_BASE), ip_adapter_tensors(TINY_PLUS)
    without_last = {name: t for name, t in base.items() if not name.startswith("ip_adapter.31.")}
    keys = [f"ip_adapter.{n}.to_{p}_ip.weight" for n in range(1, 141, 2) for p in "kv"]
    sdxl = base | dict.fromkeys(keys, torch.zeros(1, 1))
    full_face = {name: t for name, t in base.items() if name.startswith("ip_adapter.")}
    full_face["image_proj.proj.0.weight"] = torch.zeros(1)
    no_query = {name: t for name, t in plus.items() if "layers.3.0.to_q" not in name}
    no_output = {name: t for name, t in plus.items() if "proj_out.weight" not in name}
    cases = [
        ({"unet.weight": torch.zeros(1)}, "not an IP-Adapter file"),
        (without_last, "projections for 15 cross-attentions, SD1.5 has 16"),
        (sdxl, "projections for 70 cross-attentions"),
        (full_face, "full-face or FaceID"),
        (base | {"ip_adapter.1.to_k_lora.down.weight": torch.zeros(1)}, "FaceID kind"),
        ({n: t for n, t in base.items() if "ip_adapter.5.to_v" not in n}, "5.to_v_ip.weight is missing"),
        (no_query, "motion.resampler.layers.3.0.to_q.weight"),
        (no_output, r"lacks \['proj_out.weight'\]"),
        (base | {"image_proj.norm.weight": torch.zeros(0)}, r"norm.weight has the shape \(0,\)"),
        (base | {"image_proj.proj.weight": torch.zeros(3)}, r"proj.weight has the shape \(3,\); it must have 2 dim"),
        (base | {"image_proj.norm.weight": 5}, "unknown"),
        (base | {"ip_adapter.1.to_k_ip.weight": torch.zeros(())}, r"1.to_k_ip.weight has the shape \(\)"),
        (base | {"ip_adapter.x.to_k_ip.weight": torch.zeros(1)}, "projections for 17 cross-attentions"),
        (base | {"image_proj.proj.weight": torch.zeros(1, 1).expand(3072, 1024)}, "doesn't hold as many numbers"),
        (plus | {"image_proj.latents": torch.zeros(16, 768)}, r"latents has the shape \(16, 768\)"),
        (plus | {"image_proj.proj_in.weight": torch.zeros(0, 1280)}, r"proj_in.weight has the shape \(0, 1280\)"),
        (plus | {"image_proj.layers.999999999999.0.to_q.weight": torch.zeros(1)}, "layers.4.0.norm1.weight"),
    ]
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            load_ip_adapter(tensors)
