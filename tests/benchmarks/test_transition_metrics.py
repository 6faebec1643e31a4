"""The measures of transitions say what they mean, on clips whose faults are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from storydiffusion.benchmarks import smp_learning
from storydiffusion.benchmarks.transitions.metrics import Encoder, find_figure, score
from storydiffusion.benchmarks.transitions.rows import LINEAR, SMP, TRUE, advantage, as_markdown, failures, film_strips
from storydiffusion.devtools.toy.animation import FRAMES, Shot, Stance, film, moment, picture_of
from storydiffusion.devtools.toy.figure import Kind
from storydiffusion.devtools.toy.vision import load_vision
from storydiffusion.devtools.toy.world import Look

LOOK = Look(Kind.MAN, hat=True, hair=1, skin=1, top=4, trousers=3, accent=0)
SHOT = Shot(LOOK, Stance("standing", 8), Stance("waving", 24), scene=0, mirrored=False)
TRUE_CLIP = film(SHOT, FRAMES)


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


def rows(smp: list[float], linear: list[float], motion: float = 0.05) -> dict[str, list[dict[str, float]]]:
    def entries(values: list[float]) -> list[dict[str, float]]:
        return [{"pixel error": value, "embedding error": value, "motion": motion} for value in values]

    return {SMP.name: entries(smp), LINEAR.name: entries(linear), TRUE: entries([0.0] * len(smp))}


def test_winning_must_be_clear() -> None:
    clear = rows([1.0, 2.0, 3.0], [2.0, 3.1, 3.9])
    assert advantage(clear, "pixel error", LINEAR.name) == (pytest.approx(1.0), pytest.approx(0.057735, abs=1e-5))
    assert not failures(clear)
    assert len(failures(rows([1.0, 2.0, 3.0], [3.0, 1.0, 3.2]))) == 2
    assert len(failures(rows([1.0, math.nan], [2.0, 3.0]))) == 2
    assert any("motion" in sentence for sentence in failures({**clear, TRUE: rows([0.0], [0.0], 0.2)[TRUE]}))


def test_table_and_strips(encoder: Encoder) -> None:
    scores = score(TRUE_CLIP, TRUE_CLIP, SHOT, encoder)
    table = as_markdown({"true clip": [scores, scores]})
    assert "| true clip | 0.0 ± 0.0 | 0.000 ± 0.000 |" in table
    strips = film_strips({"a": [TRUE_CLIP], "b": [TRUE_CLIP]}, ["a", "b"])
    assert strips.size == (3 * 32 * FRAMES, 3 * (32 * 2 + 3) - 9)


def test_learning_must_be_clear_and_lost_with_another_end() -> None:
    def made(trained: float, control: float) -> dict[str, Any]:
        means = (trained, 1.0, control, 2.0)
        names = ("trained predictor", "linear interpolation", "trained predictor, another clip's end", "start")
        return {name: [mean - 0.01, mean + 0.01] for name, mean in zip(names, means, strict=True)}

    assert not smp_learning.failures(made(0.3, 2.0))
    assert "not well below" in smp_learning.failures(made(0.8, 2.0))[0]
    assert "another clip's end" in smp_learning.failures(made(0.3, 0.5))[0]
