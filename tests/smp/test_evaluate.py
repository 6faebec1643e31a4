"""Measures: formulas on cases computed by hand, models from local files, and the command on what training wrote."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lpips
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from storydiffusion.devtools.tiny.clips import tiny_config
from storydiffusion.devtools.tiny.motion import motion_config, motion_tensors
from storydiffusion.devtools.tiny.sd15 import (
    CLIP_EMBED_WIDTH,
    CLIP_MODEL,
    UNET_WIDTHS,
    write_open_clip,
    write_sd15,
    write_video,
)
from storydiffusion.smp import evaluate, train
from storydiffusion.smp import prepare as prepare_command
from storydiffusion.smp.encoder import load_open_clip
from storydiffusion.smp.evaluation import folders, transitions
from storydiffusion.smp.evaluation.clip_scores import Measures, clip_scores
from storydiffusion.smp.evaluation.image_scores import Pose, character_scores, pose_distance
from storydiffusion.smp.evaluation.models import BATCH, LPIPS, CLIPScorer
from storydiffusion.smp.evaluation.poses import PoseReader
from storydiffusion.smp.evaluation.published import IMAGES, VIDEO
from storydiffusion.smp.evaluation.report import format_table, mean_of, summarise
from storydiffusion.smp.training.config import Precision, TrainConfig
from storydiffusion.smp.training.data.videos import open_video
from torch import Tensor
from torchvision.models.detection import keypointrcnn_resnet50_fpn

# Formulas


def grey(*levels: float) -> Tensor:
    """One frame of 2 x 2 pixels for each level."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 2, 2, 3)


def test_clip_scores_by_hand() -> None:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3))

    def embed(images: Tensor) -> Tensor:  # a level is an angle in quarter turns
        angle = images.mean(dim=(1, 2, 3)) * math.pi / 2
        return torch.stack([angle.cos(), angle.sin()], dim=1) * 3

    frames = grey(0.0, 0.4, 0.2, 1.0)
    scores = clip_scores(frames, Measures(distance, embed), end=grey(0.9)[0])
    quarter = math.pi / 2
    assert scores == pytest.approx(
        {
            "LPIPS-first": (0.4 + 0.2 + 1.0) / 3,
            "LPIPS-frames": (0.4 + 0.2 + 0.8) / 3,
            "LPIPS-last": 0.1,
            "CLIPSIM-first": (math.cos(0.4 * quarter) + math.cos(0.2 * quarter) + 0) / 3,
            "CLIPSIM-frames": (math.cos(0.4 * quarter) + math.cos(0.2 * quarter) + math.cos(0.8 * quarter)) / 3,
            "CLIPSIM-last": math.cos(0.1 * quarter),
            "motion": (0.4 + 0.2 + 0.8) / 3,
        },
        abs=1e-6,
    )


def test_a_frozen_clip_wins_the_papers_four_and_not_the_others() -> None:
    measures = Measures(lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)), lambda x: x.flatten(1) + 0.1)
    frozen = clip_scores(grey(0.2, 0.2, 0.2), measures, end=grey(0.8)[0])
    moving = clip_scores(grey(0.2, 0.5, 0.8), measures, end=grey(0.8)[0])
    assert frozen["LPIPS-first"] == frozen["LPIPS-frames"] == frozen["motion"] == 0
    assert moving["LPIPS-last"] == 0 < frozen["LPIPS-last"]
    assert moving["motion"] == pytest.approx(0.3)
    assert clip_scores(grey(0.0, 1.0), Measures()) == {"motion": 1.0}


def test_where_ends_are_held_the_last_drawn_frame_must_have_arrived() -> None:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3))

    late, frames = grey(0.0, 0.1, 0.2, 0.9), {"LPIPS-first": (0.1 + 0.2 + 0.9) / 3, "LPIPS-frames": 0.3, "motion": 0.3}
    free = clip_scores(late, Measures(distance), end=late[-1])
    assert free == pytest.approx({**frames, "LPIPS-last": 0.0}, abs=1e-6)
    held = clip_scores(late, Measures(distance, lambda x: x.flatten(1)), end=late[-1], ends_held=True)
    assert held.pop("CLIPSIM-arrival") == pytest.approx(1.0)  # of grey pictures, whatever their level
    assert {name: value for name, value in held.items() if "CLIP" not in name} == pytest.approx(
        {**frames, "LPIPS-arrival": 0.7}, abs=1e-6
    )
    assert "CLIPSIM-last" not in held
    with pytest.raises(ValueError, match="2 frames whose ends are held has none that is drawn"):
        clip_scores(grey(0.1, 0.2), Measures(), ends_held=True)


def test_clips_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(ValueError, match="2 frames or more"):
        clip_scores(grey(0.1), Measures())
    with pytest.raises(ValueError, match=r"end picture is \(3, 2, 3\), the clip's frames are \(2, 2, 3\)"):
        clip_scores(grey(0.1, 0.2), Measures(), torch.zeros(3, 2, 3))


def test_character_scores_by_hand() -> None:
    images = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    root = math.sqrt(0.5)
    scores = character_scores(images, texts)
    assert scores == pytest.approx({"text-image": (1 + 0 + root) / 3, "character": (0 + root + root) / 3})
    assert character_scores(images, None) == pytest.approx({"character": 2 * root / 3})
    with pytest.raises(ValueError, match="at least 2 panels to be compared; it has 1"):
        character_scores(images[:1], None)
    with pytest.raises(ValueError, match=r"\(3, 2\) of panels and \(2, 2\) of texts"):
        character_scores(images, texts[:2])


def pose(*keypoints: tuple[float, float], hidden: tuple[int, ...] = ()) -> Pose:
    visible = torch.ones(len(keypoints), dtype=torch.bool)
    visible[list(hidden)] = False
    return Pose(torch.tensor(keypoints), visible)


LINE = pose((0.0, 0.0), (1.0, 0.0), (2.0, 0.0))


def test_pose_distance_by_hand() -> None:
    upright = pose((5.0, 1.0), (5.0, 5.0), (5.0, 9.0))  # elsewhere, larger, a quarter turn on
    assert pose_distance(LINE, pose((7.0, 7.0), (10.0, 7.0), (13.0, 7.0))) == pytest.approx(0)
    assert pose_distance(LINE, upright) == pytest.approx(math.sqrt(2))
    assert pose_distance(LINE, pose((2.0, 0.0), (1.0, 0.0), (0.0, 0.0))) == pytest.approx(2)  # the largest there is
    assert character_scores(torch.eye(3), None, [0.5, 2.0])["pose diversity"] == pytest.approx(1.25)
    assert "pose diversity" not in character_scores(torch.eye(3), None, [])
    assert pose_distance(LINE, pose(*3 * [(1.0, 1.0)])) is None
    with pytest.raises(ValueError, match="the same keypoints"):
        pose_distance(LINE, pose((1.0, 1.0), (2.0, 2.0)))


def test_only_joints_that_both_pictures_show_are_compared() -> None:
    seen = pose((0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (5.0, 5.0), (9.0, 0.0), hidden=(4,))
    other = pose((0.0, 3.0), (1.0, 3.0), (2.0, 3.0), (-8.0, 1.0), (0.0, 7.0), hidden=(3,))
    assert pose_distance(seen, other) == pytest.approx(0)  # but for the two guesses
    assert pose_distance(seen, pose(*map(tuple, other.keypoints.tolist()))) > 0.5
    assert pose_distance(seen, pose(*map(tuple, other.keypoints.tolist()), hidden=(0, 3))) is None  # two are left


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_poses_say_which_joints_the_network_is_sure_of(tmp_path: Path) -> None:
    torch.save(keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict(), tmp_path / "poses.pth")
    reader = PoseReader(tmp_path / "poses.pth")
    keypoints = torch.rand(2, 17, 3)
    logits = torch.tensor([[2.1, 1.9, *[5.0] * 15], [9.0] * 17])
    found = {"scores": torch.tensor([0.9, 0.8]), "keypoints": keypoints, "keypoints_scores": logits}
    reader.model = lambda images: [found]
    read = reader.read(torch.rand(8, 8, 3))
    assert torch.equal(read.keypoints, keypoints[0, :, :2])
    assert read.visible.tolist() == [True, False, *[True] * 15]
    reader.model = lambda images: [{**found, "scores": torch.tensor([0.6, 0.5])}]
    assert reader.read(torch.rand(8, 8, 3)) is None


def test_what_cannot_be_compared_is_counted(tmp_path: Path, clip_weights: Path) -> None:
    (tmp_path / "Bob").mkdir()
    for number in range(4):
        Image.new("L", (30, 30), number).save(tmp_path / "Bob" / f"{number}.png")
    half = pose(*map(tuple, LINE.keypoints.tolist()), hidden=(0,))
    reader = SimpleNamespace(read=lambda image: [LINE, half, None, LINE][round(float(image.mean()) * 255)])
    scores, left = folders.score_characters(tmp_path, CLIPScorer(clip_weights, CLIP_MODEL), reader)
    assert scores["Bob"]["pose diversity"] == 0
    assert (left.panels, left.pairs) == (1, 2)


def test_means_and_their_errors_by_hand() -> None:
    mean = mean_of([1.0, 2.0, 6.0])  # deviations -2, -1, 3: variance 7
    assert (mean.mean, mean.error, mean.count) == (3.0, pytest.approx(math.sqrt(7 / 3)), 3)
    assert math.isnan(mean_of([1.0]).error)
    with pytest.raises(ValueError, match="no values"):
        mean_of([])
    rows = summarise([{"a": 1.0}, {"a": 3.0, "b": 2.0}])
    assert (rows["a"].mean, rows["a"].count, rows["b"].count) == (2.0, 2, 1)


def test_the_table_has_the_published_rows_beside() -> None:
    table = format_table({"mine": summarise([{"LPIPS-first": 0.5, "motion": 0.1}])}, VIDEO).splitlines()
    assert table[0] == "| | LPIPS-first | motion | LPIPS-frames | CLIPSIM-first | CLIPSIM-frames |"
    assert table[2] == "| mine | 0.5000 | 0.1000 | - | - | - |"
    assert table[5] == "| StoryDiffusion (published) | 0.3794 | - | 0.1635 | 0.9606 | 0.9870 |"
    assert [*VIDEO, *IMAGES] == ["SEINE", "SparseCtrl", "StoryDiffusion", "IP-Adapter", "PhotoMaker", "StoryDiffusion"]


# Models


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random trunk under torchvision's names."""
    torch.manual_seed(3)
    trunk = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).net
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    names = {name: f"features.{name.partition('.')[2]}" for name in trunk.state_dict()}
    torch.save({names[name]: value for name, value in trunk.state_dict().items()}, path)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")  # the package calls it with arguments of its day
def test_lpips_is_the_packages_own_with_the_files_trunk(lpips_weights: Path) -> None:
    torch.manual_seed(3)  # the same random trunk
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    ours = LPIPS(lpips_weights)
    a, b = torch.rand(2, 64, 64, 3), torch.rand(2, 64, 64, 3)
    with torch.no_grad():
        expected = theirs(a.movedim(-1, 1), b.movedim(-1, 1), normalize=True).flatten()
    torch.testing.assert_close(ours(a, b), expected)
    assert (expected > 0).all()
    assert torch.equal(ours(a, a), torch.zeros(2))


def test_lpips_sees_a_long_video_in_parts(lpips_weights: Path) -> None:
    distance, sizes = LPIPS(lpips_weights), []
    distance.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    a, b = torch.rand(2, BATCH + 3, 64, 64, 3)
    together = distance(a, b)
    assert sizes == [BATCH, 3]
    torch.testing.assert_close(together[BATCH:], distance(a[BATCH:], b[BATCH:]))
    assert together.shape == (BATCH + 3,)


def test_a_video_is_resized_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", 12, size=128)
    events: list[str] = []
    resized = folders._resized

    @contextmanager
    def opened(path: Path) -> Iterator[SimpleNamespace]:
        def decode(container: Any) -> Iterator[Any]:
            for frame in container.decode(video=0):
                events.append("decoded")
                yield frame

        with open_video(path) as container:
            yield SimpleNamespace(decode=lambda video: decode(container))

    def watched(images: Tensor, shape: tuple[int, int]) -> Tensor:
        events.append("resized")
        return resized(images, shape)

    monkeypatch.setattr(folders, "open_video", opened)
    monkeypatch.setattr(folders, "_resized", watched)
    assert folders.read_video(tmp_path / "a.mp4", 64).shape == (12, 64, 72, 3)
    assert events == 12 * ["decoded", "resized"]


def test_weights_that_are_not_there_or_do_not_fit_are_refused(lpips_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LPIPS needs torchvision's alexnet-owt-7be5be79.pth"):
        LPIPS(tmp_path / "missing.pth")
    weights = torch.load(lpips_weights, weights_only=True)
    torch.save(weights | {"features.3.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth has no features.3.weight of shape \(192, 64, 5, 5\)"):
        LPIPS(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="There is no open_clip weights file"):
        CLIPScorer(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="poses need torchvision's keypointrcnn"):
        PoseReader(tmp_path / "missing.pth")


# The command


def run(monkeypatch: pytest.MonkeyPatch, module: object, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["smp", *(str(word) for word in words)])
    return module.main()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_open_clip(tmp_path_factory.mktemp("clip"))


def test_a_folder_of_videos(
    tmp_path: Path,
    lpips_weights: Path,
    clip_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", 4, seed=number, size=64)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "1.png")
    (tmp_path / "broken.mp4").write_text("text", encoding="utf-8")
    weights = ["--lpips-weights", lpips_weights, "--clip-weights", clip_weights, "--clip-model", CLIP_MODEL]
    assert run(monkeypatch, evaluate, "videos", tmp_path, *weights, "--size", 64, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "skipped broken.mp4: " in printed
    assert "2 videos (mean ± standard error)" in printed
    header = next(line for line in printed.splitlines() if line.startswith("| |"))
    names = [name.strip() for name in header.split("|")[2:-1]]
    measures = [f"{kind}-{part}" for kind in ("LPIPS", "CLIPSIM") for part in ("first", "frames", "last")]
    assert sorted(names) == sorted([*measures, "motion"])
    assert "| SEINE (published) | 0.4332 |" in printed
    assert run(monkeypatch, evaluate, "videos", tmp_path / "nothing") == 1
    assert "There is no folder" in capsys.readouterr().err


def test_a_folder_of_characters(
    tmp_path: Path, clip_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("Bob", "Alice"):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = torch.randint(256, (30, 30, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text(f"{name} does thing {number}", encoding="utf-8")
    options = ["--clip-weights", clip_weights, "--clip-model", CLIP_MODEL, "--device", "cpu"]
    assert run(monkeypatch, evaluate, "images", tmp_path, *options) == 0
    printed = capsys.readouterr().out
    assert "2 characters" in printed
    assert "| PhotoMaker (published) | 0.6541 | 0.8924 |" in printed
    assert printed.count("±") == 3  # the heading, and both measures
    (tmp_path / "Bob" / "1.txt").write_bytes(b"\xff")
    assert run(monkeypatch, evaluate, "images", tmp_path, *options) == 1
    assert "Character Bob: 1.txt is not UTF-8: byte 0 is 0xff" in capsys.readouterr().err
    (tmp_path / "Bob" / "1.txt").unlink()
    assert run(monkeypatch, evaluate, "images", tmp_path, *options) == 1
    assert "Character Bob: Some panels have a prompt and some have none" in capsys.readouterr().err


def test_clip_scorer_embeds_as_the_encoder_does_and_texts_too(clip_weights: Path) -> None:
    scorer = CLIPScorer(clip_weights, CLIP_MODEL)
    images = torch.rand(2, 30, 40, 3)
    with torch.no_grad():
        torch.testing.assert_close(scorer.embed(images), load_open_clip(clip_weights, CLIP_MODEL)(images).image_embeds)
    texts = scorer.embed_texts(["a cat", "a dog", "a cat"])
    assert texts.shape == (3, CLIP_EMBED_WIDTH)
    torch.testing.assert_close(texts[0], texts[2])
    assert not torch.allclose(texts[0], texts[1])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_from_videos_to_a_table_by_the_commands_alone(
    precision: Precision,
    tmp_path: Path,
    lpips_weights: Path,
    clip_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "videos").mkdir()
    for number in range(3):
        write_video(tmp_path / "videos" / f"{number}.mp4", 6, seed=number, size=64)
    write_sd15(tmp_path / "sd15")
    module = motion_tensors(motion_config(UNET_WIDTHS, res_blocks=1), dtype=torch.float32)
    torch.save({"state_dict": {f"module.{name}": value for name, value in module.items()}}, tmp_path / "mm.ckpt")
    config = replace(end_to_end_config(tmp_path), mixed_precision=precision)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    encoder = ["--encoder", clip_weights, "--encoder-model", CLIP_MODEL, "--device", "cpu"]
    shape = ["--frames", "3", "--stride", "2", "--size", "64"]
    words = ["embeddings", tmp_path / "videos", tmp_path / "clips", "--config", path, *encoder, *shape]
    assert run(monkeypatch, prepare_command, *words) == 0
    AcceleratorState._reset_state()  # one process, one precision, were it not for the tests before
    assert run(monkeypatch, train, "--config", path) == 0
    AcceleratorState._reset_state()
    assert {file.name for file in (tmp_path / "run").glob("*.safetensors")} == {
        "smp.safetensors",
        "motion_module.safetensors",
    }
    capsys.readouterr()
    trained = ["--weights", tmp_path / "run" / "smp.safetensors"]
    trained += ["--motion-module", tmp_path / "run" / "motion_module.safetensors"]
    measures = ["--lpips-weights", lpips_weights, "--clip-weights", clip_weights, "--clip-model", CLIP_MODEL]
    assert run(monkeypatch, evaluate, "transitions", "--config", path, *trained, *measures, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "3 transitions" in printed
    rows = {line.split("|")[1].strip(): line for line in printed.splitlines() if line.startswith("|")}
    assert {"SMP", "linear interpolation", "SparseCtrl (published)"} <= rows.keys()
    assert rows["SMP"].split("|")[2:] != rows["linear interpolation"].split("|")[2:]
    header = printed[printed.index("| |") :].splitlines()[0]
    assert {"LPIPS-arrival", "CLIPSIM-arrival", "token error"} <= {name.strip() for name in header.split("|")}
    assert "-last" not in header
    assert "the last drawn frame, the last but one, with the true end" in printed
    asked: list[list[int]] = []
    monkeypatch.setattr(transitions, "compare_transitions", lambda *given: asked.append(given[3]) or {})
    assert run(monkeypatch, evaluate, "transitions", "--config", path, *trained, "--clips", 2, "--device", "cpu") == 0
    assert asked == [[0, 2]]  # spread over the set
    path.write_text(json.dumps(replace(config, stage="semantic").to_dict()), encoding="utf-8")
    assert run(monkeypatch, evaluate, "transitions", "--config", path, *trained) == 1
    assert "the config needs both" in capsys.readouterr().err


def end_to_end_config(folder: Path) -> TrainConfig:
    """Both stages' settings for the small SD1.5."""
    sites = [("input", 1), ("input", 3), ("output", 0), ("output", 1), ("output", 2), ("output", 3), ("middle", 0)]
    model = tiny_config(folder).model | {
        "encoder_width": CLIP_EMBED_WIDTH,
        "sites": [{"block": block, "number": number, "index": 0, "channels": 32} for block, number in sites],
        "projection": {"embed_width": CLIP_EMBED_WIDTH, "tokens": 2, "width": 16},
    }
    return tiny_config(
        folder / "run",
        stage="decoding",
        model=model,
        frames=3,
        data=str(folder / "clips"),
        validation_data=str(folder / "clips"),
        sd15=str(folder / "sd15"),
        motion_module=str(folder / "mm.ckpt"),
        iterations=2,
        global_batch=2,
        micro_batch=1,
        preview_clips=1,
        preview_steps=2,
    )
