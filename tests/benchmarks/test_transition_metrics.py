"""The measures of transitions say what they mean, on clips whose faults are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from storydiffusion.benchmarks import smp_learning
from storydiffusion.benchmarks.transitions.drawing import Animator, Sampling, what_stays
from storydiffusion.benchmarks.transitions.metrics import Encoder, find_figure, score
from storydiffusion.benchmarks.transitions.rows import (
    ALONE,
    FADED,
    FROZEN,
    LINEAR,
    RENDERED,
    SMP,
    TRUE,
    Rows,
    advantage,
    as_markdown,
    draw_all,
    failures,
    film_strips,
    held_out_shots,
)
from storydiffusion.devtools.toy.animation import FRAMES, Shot, Stance, film, moment, picture_of
from storydiffusion.devtools.toy.clips import ToyClips
from storydiffusion.devtools.toy.figure import Kind
from storydiffusion.devtools.toy.train_video import in_memory
from storydiffusion.devtools.toy.vision import load_vision
from storydiffusion.devtools.toy.world import POSE_NAMES, POSITIONS, Look
from torch import Tensor

LOOK = Look(Kind.MAN, hat=True, hair=1, skin=1, top=4, trousers=3, accent=0)
SHOT = Shot(LOOK, Stance("standing", 8), Stance("waving", 24), scene=0, mirrored=False)
TRUE_CLIP = film(SHOT, FRAMES)
LATE = "a frame late"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_vision())


def test_the_true_clip_has_no_fault(encoder: Encoder) -> None:
    scores = score(TRUE_CLIP, TRUE_CLIP, SHOT, encoder)
    for name in ("pixel error", "embedding error", "arrival", "last frame", "place"):
        assert scores[name] == 0, name
    assert scores["colours"] == 1
    assert scores["CLIPSIM-last"] == pytest.approx(1)
    assert scores["LPIPS-last"] == pytest.approx(0, abs=1e-6)
    assert scores["motion"] > 0.01


def test_a_frozen_clip_looks_smooth_but_never_arrives(encoder: Encoder) -> None:
    frozen = np.repeat(TRUE_CLIP[:1], FRAMES, axis=0)
    scores = score(frozen, TRUE_CLIP, SHOT, encoder)
    assert scores["motion"] == 0
    assert scores["LPIPS-frames"] == pytest.approx(0, abs=1e-6)
    assert scores["embedding error"] == pytest.approx(1)
    assert scores["arrival"] > 10
    assert scores["CLIPSIM-last"] < 0.95


def test_other_clothes_are_seen() -> None:
    other = Look(Kind.MAN, hat=True, hair=1, skin=1, top=5, trousers=3, accent=0)
    dressed = replace(SHOT, look=other)
    _, right = find_figure(picture_of(dressed, moment(dressed, 0.5)), SHOT, 0.5)
    assert right == pytest.approx(4 / 5)


@pytest.mark.parametrize("shift", [-8, 1, 3])
def test_a_figure_beside_its_place_is_found(shift: int) -> None:
    moved = Shot(LOOK, *(Stance(s.pose, s.x + shift) for s in (SHOT.start, SHOT.end)), scene=0, mirrored=False)
    off, right = find_figure(picture_of(moved, moment(moved, 0.5)), SHOT, 0.5)
    assert off == abs(shift)
    assert right == 1


def test_who_is_late_has_not_arrived(encoder: Encoder) -> None:
    late = np.concatenate([np.repeat(TRUE_CLIP[:1], FRAMES - 1, axis=0), TRUE_CLIP[-1:]])  # held to its end
    scores = score(late, TRUE_CLIP, SHOT, encoder)
    off = 255 * np.abs(late - TRUE_CLIP).mean(axis=(1, 2, 3))
    assert scores["arrival"] == pytest.approx(off[-2])
    assert off[-2] > 10
    assert scores["last frame"] == 0
    assert scores["pixel error"] == pytest.approx(off[1:-1].mean())


@pytest.mark.parametrize("kind", list(Kind))
def test_the_prompt_of_a_transition_tells_nothing_of_its_movement(kind: Kind) -> None:
    shot = replace(SHOT, look=replace(LOOK, kind=kind))
    stances = [Stance(pose, x) for pose in POSE_NAMES for x in POSITIONS.values()]
    told = {what_stays(replace(shot, start=start, end=end)) for start in stances for end in stances}
    assert len(told) == 1
    assert what_stays(replace(shot, scene=1)) not in told


# Winning


@pytest.fixture(scope="module")
def known(encoder: Encoder) -> Rows:
    """Scores of ways to fill in clips that are known to be good or bad: walks, which a fade can't show."""
    every: Rows = {}
    for shot in walks(4):
        true = film(shot, FRAMES)
        late = np.concatenate([true[:1], true[:-2], true[-1:]])
        for name, clip in {**{name: make(true) for name, make in RENDERED.items()}, LATE: late}.items():
            every.setdefault(name, []).append(score(clip.astype(np.float32), true, shot, encoder))
    return every


def walks(count: int) -> list[Shot]:
    return [shot for shot in held_out_shots(4 * count, seed=5) if abs(shot.start.x - shot.end.x) > 8][:count]


def against(known: Rows, smp: str, linear: str) -> Rows:
    return {SMP.name: known[smp], LINEAR.name: known[linear], TRUE: known[TRUE]}


@pytest.mark.slow
def test_who_shows_the_movement_wins_against_who_does_not(known: Rows) -> None:
    assert len(known[TRUE]) == 4
    assert not failures(against(known, TRUE, FADED))
    assert not failures(against(known, LATE, FADED))
    assert len(failures(against(known, FADED, FADED))) == 3  # neither measure, and it hardly moves
    assert len(failures(against(known, TRUE, TRUE))) == 2
    assert len(failures(against(known, FADED, LATE))) == 3
    still = failures(against(known, FROZEN, FROZEN))
    assert len(still) == 3
    assert "motion: 0.000, less than half of the true clips'" in still[-1]


@pytest.mark.slow
def test_an_advantage_that_may_be_chance_is_none(known: Rows) -> None:
    unsure = against(known, FADED, FADED)
    unsure[SMP.name] = [known[LATE][0], *known[FADED][1:]]  # one clip is better
    gain, error = advantage(unsure, "pixel error", LINEAR.name)
    assert 0 < gain == pytest.approx(error)  # of one number among zeros
    assert len(failures(unsure)) >= 2
    broken = against(known, TRUE, FADED)
    broken[SMP.name] = [{**scores, "pixel error": math.nan} for scores in broken[SMP.name]]
    assert len(failures(broken)) == 1


def test_an_advantage_is_the_mean_of_what_clips_gain_by_hand() -> None:
    made = {
        name: [{"pixel error": value} for value in values]
        for name, values in {SMP.name: (1.0, 2.0, 3.0), LINEAR.name: (2.0, 3.1, 3.9)}.items()
    }
    assert advantage(made, "pixel error", LINEAR.name) == (pytest.approx(1.0), pytest.approx(0.057735, abs=1e-5))


@pytest.mark.slow
def test_the_shipped_predictor_wins_its_walks_and_what_it_is_measured_against_would_not() -> None:
    animator = Animator(Sampling(steps=4))
    drawn, clips = draw_all(animator, walks(3), (SMP, LINEAR, ALONE))
    assert not failures(drawn)
    for name in (LINEAR.name, ALONE.name, FROZEN):
        assert len(failures({**drawn, SMP.name: drawn[name]})) >= 2, name
    for shot, clip in zip(walks(3), clips[SMP.name], strict=True):  # its ends are held to the panels
        true = film(shot, FRAMES)
        assert np.abs(clip[[0, -1]] - true[[0, -1]]).mean() < 0.01 < np.abs(clip[4] - true[0]).mean()


def test_table_and_strips(encoder: Encoder) -> None:
    scores = score(TRUE_CLIP, TRUE_CLIP, SHOT, encoder)
    table = as_markdown({"true clip": [scores, scores]})
    assert "| true clip | 0.0 ± 0.0 | 0.000 ± 0.000 |" in table
    strips = film_strips({"a": [TRUE_CLIP], "b": [TRUE_CLIP]}, ["a", "b"])
    assert strips.size == (3 * 32 * FRAMES, 3 * (32 * 2 + 3) - 9)


# Learning


def straight(start: Tensor, end: Tensor, frames: int) -> Tensor:
    times = torch.linspace(0, 1, frames)[:, None, None]
    return start[:, None] * (1 - times) + end[:, None] * times


def test_who_has_learned_the_way_loses_it_with_another_end() -> None:
    reader = load_vision()
    clips = in_memory(ToyClips("held out", 24, FRAMES, clip=None, clip_vision=reader, seed=1))
    true = torch.stack([clip["tokens"] for clip in (clips[number] for number in range(24))])

    def knows(start: Tensor, end: Tensor, frames: int) -> Tensor:
        """The true way for the true end, and the straight one to any other."""
        right = (end == true[:, -1]).flatten(1).all(1)
        return torch.where(right[:, None, None, None], true, straight(start, end, frames))

    def measured(predictor: Any) -> dict[str, list[float]]:
        return smp_learning.measure(predictor, [{"tokens": tokens} for tokens in true])

    rows = measured(knows)
    others = torch.cat([true[-1:], true[:-1]])
    for name, way in (
        ("trained predictor", true),
        ("linear interpolation", straight(true[:, 0], true[:, -1], FRAMES)),
        ("trained predictor, another clip's end", straight(true[:, 0], others[:, -1], FRAMES)),
        ("start again and again", true[:, :1].expand_as(true)),
    ):
        expected = (way - true)[:, 1:-1].square().mean(dim=(1, 2, 3))
        assert rows[name] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6), name
    assert not smp_learning.failures(rows)
    assert "not well below" in smp_learning.failures(measured(straight))[0]  # an untrained one
    (deaf,) = smp_learning.failures(measured(lambda start, end, frames: true))  # reads nothing of the end
    assert "another clip's end" in deaf
