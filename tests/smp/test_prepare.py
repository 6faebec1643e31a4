"""Videos to shards: what is cut, what is skipped and listed, and what an interruption costs."""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file
from storydiffusion.devtools.tiny.clips import tiny_config
from storydiffusion.devtools.tiny.sd15 import (
    CLIP_EMBED_WIDTH,
    CLIP_MODEL,
    TEXT_WIDTH,
    write_open_clip,
    write_sd15,
    write_video,
)
from storydiffusion.smp import prepare as command
from storydiffusion.smp.encoder import load_open_clip
from storydiffusion.smp.evaluation import folders as evaluation
from storydiffusion.smp.training.data import clip_files
from storydiffusion.smp.training.data.captions import read_captions
from storydiffusion.smp.training.data.clip_files import from_pictures
from storydiffusion.smp.training.data.encode import SD15Encoder, TokenEncoder, encoding_precision
from storydiffusion.smp.training.data.plan import agree_on_plan
from storydiffusion.smp.training.data.prepare import Job, Source, prepare
from storydiffusion.smp.training.data.shards import EncodedClips, ShardReader
from storydiffusion.smp.training.data.videos import BrokenVideoError, ClipShape, cut_clips
from storydiffusion.smp.training.run.start import start_smp
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

SHAPE = ["--frames", "3", "--stride", "2", "--size", "32", "--clips-per-video", "2", "--videos-per-shard", "2"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good videos and three broken ones, in two folders."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    for number in range(5):
        place = folder / ("sub" if number % 2 else "")
        write_video(place / f"video{number}.mp4", 12, seed=number)
        (place / f"video{number}.txt").write_text(f"a square {'abcde'[number]}\n", encoding="utf-8")
    (folder / "no-video.mp4").write_text("this is text", encoding="utf-8")
    write_video(folder / "short.mp4", 4)
    whole = (folder / "video0.mp4").read_bytes()
    (folder / "sub" / "truncated.mp4").write_bytes(whole[: len(whole) // 3])
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["smp.prepare", *(str(word) for word in words)])
    return command.main()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_videos_become_clips_and_broken_ones_are_listed(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "clips", videos, tmp_path / "out", *SHAPE) == 0
    assert "10 clips in 4 shards; 3 broken files" in capsys.readouterr().out
    broken = json.loads((tmp_path / "out" / "broken.json").read_text())
    assert broken.keys() == {"no-video.mp4", "short.mp4", "sub/truncated.mp4"}
    assert broken["short.mp4"] == "2 frames at every 2th, a clip needs 3"
    assert broken["no-video.mp4"].startswith("cannot be decoded: ")
    reader = ShardReader(str(tmp_path / "out"))
    clips = [from_pictures(reader, number) for number in range(len(reader))]
    assert len({clip.key for clip in clips}) == 10
    assert sorted(clip.caption for clip in clips) == sorted(2 * [f"a square {letter}" for letter in "abcde"])
    assert all(clip.frames.shape == (3, 32, 32, 3) for clip in clips)


def test_clips_are_the_frames_they_should_be(videos: Path) -> None:
    every = next(cut_clips(videos / "video0.mp4", ClipShape(frames=12, stride=1, size=48)))
    shape = ClipShape(frames=3, stride=2, size=48, clips_per_video=3)
    cut = list(cut_clips(videos / "video0.mp4", shape))
    numbers = [[next(i for i in range(12) if torch.equal(every[i], frame)) for frame in clip] for clip in cut]
    assert numbers == [[0, 2, 4], [5, 7, 9]]
    assert every[0].mean() < 0.5 < every[0, 20, 4].mean()  # centred: the square is where it was drawn, less 8 pixels
    with pytest.raises(BrokenVideoError, match="a clip needs 9"):
        list(cut_clips(videos / "video0.mp4", ClipShape(frames=9, stride=2)))
    with pytest.raises(ValueError, match="stride is 0; it must be at least 1"):
        ClipShape(stride=0)


def test_an_interrupted_preparation_goes_on_and_gives_the_same(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded: list[str] = []
    encode = clip_files.as_pictures

    def watched(clip: clip_files.RawClip) -> dict:
        encoded.append(clip.key)
        if len(encoded) == 6:
            raise KeyboardInterrupt
        return encode(clip)

    monkeypatch.setattr(command, "as_pictures", watched)
    out = tmp_path / "out"
    assert run(monkeypatch, "clips", videos, out, *SHAPE) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert not (out / "index.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(done) < 4
    before = len(encoded)
    assert run(monkeypatch, "clips", videos, out, *SHAPE) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert len(encoded) - before < 10  # clips of shards that were done are not made again
    whole = tmp_path / "whole"
    assert run(monkeypatch, "clips", videos, whole, *SHAPE) == 0
    assert contents(out) == contents(whole)


def test_parts_fill_one_folder(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(monkeypatch, "clips", videos, out, *SHAPE, "--part", "1/2") == 0
    assert "the index is written when all parts are" in capsys.readouterr().out
    assert not (out / "index.json").exists()
    assert run(monkeypatch, "clips", videos, out, *SHAPE, "--part", "0/2") == 0
    assert run(monkeypatch, "clips", videos, whole, *SHAPE) == 0
    assert contents(out) == contents(whole)


def test_other_settings_in_the_same_folder_are_refused(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "clips", videos, tmp_path / "out", *SHAPE) == 0
    assert run(monkeypatch, "clips", videos, tmp_path / "out", *SHAPE, "--stride", "1") == 1
    error = capsys.readouterr().err
    assert "begun with other settings (source.stride: 2 -> 1). Set them back to go on with it" in error
    for words, message in (
        (["clips", tmp_path / "nothing", tmp_path / "x"], "There is no folder"),
        (["clips", videos, tmp_path / "x", "--part", "2/2"], "--part is '2/2'"),
        (["clips", tmp_path / "out", tmp_path / "x"], "There are no videos in"),
    ):
        assert run(monkeypatch, *words) == 1
        assert message in capsys.readouterr().err


def test_captions_that_came_later_are_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "a.mp4", 12)
    out = tmp_path / "out"
    assert run(monkeypatch, "clips", tmp_path, out, *SHAPE) == 0
    (tmp_path / "a.txt").write_text("a square", encoding="utf-8")
    capsys.readouterr()
    assert run(monkeypatch, "clips", tmp_path, out, *SHAPE) == 1
    message = "(source.captions changed). Set them back to go on with it; to use the new ones, name another folder"
    assert message in capsys.readouterr().err
    (tmp_path / "table.csv").write_text("video,caption\na.mp4,a square\n", encoding="utf-8")
    assert run(monkeypatch, "clips", tmp_path, tmp_path / "new", *SHAPE) == 0
    words = ["--captions", tmp_path / "table.csv"]  # the same captions from another place
    assert run(monkeypatch, "clips", tmp_path, tmp_path / "new", *SHAPE, *words) == 0


def fill(out: Path, part: int, parts: int, barrier: Barrier) -> None:
    """One process: a clip a shard, and a blank that differs in rounding."""
    jobs = [Job(f"{shard:06d}.tar", lambda _, shard=shard: iter([clip_named(shard)])) for shard in range(2 * parts)]
    barrier.wait()
    prepare(Source(jobs, 2, {}), out, clip_files.as_pictures, {"kind": "clips"}, {"blank": 1 + part}, (part, parts))


def clip_named(shard: int) -> clip_files.RawClip:
    return clip_files.RawClip(f"{shard:08d}", "", torch.zeros(2, 8, 8, 3))


@pytest.mark.slow
def test_parts_that_start_at_once_meet_without_harm(tmp_path: Path) -> None:
    parts, context = 4, multiprocessing.get_context("fork")  # as started, they are closer together than commands
    for attempt in range(10):
        out, barrier = tmp_path / str(attempt), context.Barrier(parts)
        processes = [context.Process(target=fill, args=(out, part, parts, barrier)) for part in range(parts)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * parts
        reader = ShardReader(str(out))
        assert len(reader) == 2 * parts
        begun = json.loads((out / "plan.json").read_text(encoding="utf-8"))
        assert reader.about["blank"] == begun["computed"]["blank"]
        assert not list(out.rglob("*.partial"))


def test_a_folder_is_begun_once(tmp_path: Path) -> None:
    assert agree_on_plan(tmp_path, {"a": {"b": 1}}, {"blank": [0.1]}) == {"blank": [0.1]}
    assert agree_on_plan(tmp_path, {"a": {"b": 1}}, {"blank": [0.1000001]}) == {"blank": [0.1]}
    with pytest.raises(ValueError, match=r"other settings \(a.b: 1 -> 2; c: None -> 'new'\)"):
        agree_on_plan(tmp_path, {"a": {"b": 2}, "c": "new"}, {})


def test_a_tag_in_an_old_encoding_costs_nothing_and_such_a_caption_its_video(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    write_video(source / "tagged.mp4", 12, title="Bogenhaus")
    whole = (source / "tagged.mp4").read_bytes()
    assert b"Bogenhaus" in whole
    (source / "tagged.mp4").write_bytes(whole.replace(b"Bogenhaus", "Bögenhäus".encode("latin-1")))
    write_video(source / "told.mp4", 12)
    (source / "told.txt").write_bytes("ein Bögenhaus".encode("latin-1"))
    assert run(monkeypatch, "clips", source, tmp_path / "out", *SHAPE) == 0
    assert "2 clips in 1 shards; 1 broken files" in capsys.readouterr().out
    broken = json.loads((tmp_path / "out" / "broken.json").read_text())
    assert broken == {"told.mp4": "its caption told.txt is not UTF-8: byte 5 is 0xf6"}
    assert evaluation.read_video(source / "tagged.mp4", 48).shape == (12, 48, 64, 3)

    (tmp_path / "captions.csv").write_bytes("video,caption\ntold.mp4,Bögenhaus\n".encode("latin-1"))
    for table, message in (("captions.csv", "captions.csv is not UTF-8"), ("none.csv", "There is no table")):
        assert run(monkeypatch, "clips", source, tmp_path / "x", *SHAPE, "--captions", tmp_path / table) == 1
        assert message in capsys.readouterr().err


def test_captions_come_from_a_table_too(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text('video,caption\nsub/a.mp4,"a cat, asleep"\n', encoding="utf-8")
    assert read_captions(tmp_path / "captions.csv") == {"sub/a.mp4": "a cat, asleep"}
    (tmp_path / "captions.csv").write_text("name,text\n", encoding="utf-8")
    with pytest.raises(ValueError, match="it needs 'video' and 'caption'"):
        read_captions(tmp_path / "captions.csv")


@torch.no_grad()
def as_sd15_encodes(folder: Path, frames: Tensor, caption: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of frames, and text tokens of a caption and of none, by diffusers' and transformers' own classes."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    pixels = VaeImageProcessor().preprocess(frames.movedim(-1, 1))  # to -1..1
    latents = vae.encode(pixels).latent_dist.mode() * 0.18215  # SD1.5's factor
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    ids = tokenizer([caption, ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    text, empty = model(ids).last_hidden_state
    return latents, text, empty


@pytest.mark.slow
def test_embeddings_are_the_encoders_from_videos_and_from_clips_alike(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, sd15 = write_open_clip(tmp_path), tmp_path / "sd15"
    write_sd15(sd15)
    model = tiny_config(tmp_path).model | {"encoder_width": CLIP_EMBED_WIDTH}
    config = tiny_config(tmp_path / "run", frames=3, model=model, sd15=str(sd15))
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    options = [
        "--config",
        tmp_path / "run.json",
        "--encoder",
        weights,
        "--encoder-model",
        CLIP_MODEL,
        "--device",
        "cpu",
    ]
    assert run(monkeypatch, "embeddings", videos, tmp_path / "direct", *SHAPE, *options) == 0
    assert run(monkeypatch, "clips", videos, tmp_path / "clips", *SHAPE) == 0
    assert run(monkeypatch, "embeddings", tmp_path / "clips", tmp_path / "via", *options) == 0

    fields = ("tokens", "latents", "text")
    direct, via = (EncodedClips(str(tmp_path / name), fields, frames=3) for name in ("direct", "via"))
    pictures = ShardReader(str(tmp_path / "clips"))
    clip = from_pictures(pictures, 4)
    with torch.no_grad():
        tokens = load_open_clip(weights, CLIP_MODEL)(clip.frames).image_embeds[:, None]
    latents, text, empty = as_sd15_encodes(sd15, clip.frames, clip.caption)
    torch.testing.assert_close(via[4]["tokens"], tokens, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(via[4]["latents"], latents, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(via[4]["text"], text, rtol=2e-3, atol=2e-3)
    assert via[4]["text"].shape == (77, TEXT_WIDTH)
    assert not torch.allclose(via[4]["text"], via[0]["text"], atol=1e-2)
    assert len(direct) == len(via) == 10
    for number in range(10):  # but for what JPEG loses
        torch.testing.assert_close(direct[number]["tokens"], via[number]["tokens"], rtol=0.1, atol=0.1)
    assert torch.equal(via.blank["tokens"], torch.zeros(1, CLIP_EMBED_WIDTH))
    torch.testing.assert_close(via.blank["text"], empty)

    other = load_file(weights)
    other["visual.proj"] += 1
    save_file(other, weights)
    capsys.readouterr()
    assert run(monkeypatch, "embeddings", tmp_path / "clips", tmp_path / "via", *options) == 1
    assert "other settings (weights.image_encoder changed)" in capsys.readouterr().err


def test_on_a_gpu_encoders_compute_in_the_configs_precision(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, mixed_precision="bf16")
    assert encoding_precision(config, torch.device("cuda", 1)) == "bf16"
    assert encoding_precision(config, torch.device("cpu")) == "no"
    weights, device = write_open_clip(tmp_path), torch.device("cpu")
    write_sd15(tmp_path / "sd15")
    model = config.model | {"encoder_width": CLIP_EMBED_WIDTH, "uncond": "blank_image"}
    motion, _ = start_smp(replace(config, model=model))
    clip = clip_files.RawClip("0", "a square", torch.rand(2, 64, 64, 3))
    for make in (
        lambda precision: TokenEncoder(load_open_clip(weights, CLIP_MODEL), motion, device, precision),
        lambda precision: SD15Encoder(tmp_path / "sd15", device, precision),
    ):
        whole, half = make("no"), make("bf16")
        assert whole.weights() == half.weights()
        for full, low in ((whole.encode(clip), half.encode(clip)), (whole.blank(), half.blank())):
            assert full.keys() == low.keys()
            for name, value in full.items():
                assert value.dtype == torch.float32
                assert not torch.equal(low[name].float(), value)
                torch.testing.assert_close(low[name].float(), value, rtol=0.05, atol=0.05)
