"""The oracle reads rendered pictures without an error, and still does under noise."""

from __future__ import annotations

import numpy as np
import pytest
from storydiffusion.devtools.toy.figure import POSES, Part
from storydiffusion.devtools.toy.oracle import Reading, palette_of, read_pictures
from storydiffusion.devtools.toy.world import POSITIONS, Picture, random_example, render

PICTURES = [random_example(np.random.default_rng(seed))[3] for seed in range(160)]
IMAGES = np.stack([render(picture) for picture in PICTURES])
ANCHORS = np.array(list(POSITIONS.values()))


def accuracies(reading: Reading, pictures: list[Picture]) -> dict[str, float]:
    """Share of right answers, over pictures or over the figures in them."""
    right: dict[str, list[bool]] = {}

    def note(name: str, ok: bool) -> None:
        right.setdefault(name, []).append(bool(ok))

    for index, picture in enumerate(pictures):
        note("scene", reading.scene[index] == picture.scene)
        note("figures", reading.figures[index] == len(picture.actors))
        for place, actor in enumerate(picture.actors):
            look = actor.look
            note("kind", reading.kind[index, place] == look.kind)
            note("hat", reading.hat[index, place] == look.hat)
            note("pose", reading.pose[index, place] == list(POSES.values()).index(actor.pose))
            note("position", reading.position[index, place] == np.abs(ANCHORS - actor.x).argmin())
            parts = {"hair": Part.HAIR, "skin": Part.FACE, "top": Part.TOP, "accent": Part.LEFT_SHOE}
            for field, part in parts.items():
                colour = reading.colours[index, place, part]
                nearest = np.linalg.norm(palette_of(part, look.kind) - colour, axis=1).argmin()
                note(field, nearest == getattr(look, field))
    return {name: float(np.mean(values)) for name, values in right.items()}


@pytest.mark.parametrize(("noise", "least"), [(0.0, 1.0), (0.1, 1.0), (0.3, 0.9)])
def test_oracle_accuracy(noise: float, least: float) -> None:
    noisy = IMAGES + noise * np.random.default_rng(0).normal(size=IMAGES.shape)
    reading = read_pictures(noisy.astype(np.float32))
    for name, accuracy in accuracies(reading, PICTURES).items():
        assert accuracy >= least, f"{name}: {accuracy}"
    assert reading.residual.mean() == pytest.approx(noise, abs=0.01)


def test_a_wrong_figure_is_not_read_as_right() -> None:
    """The accuracy can fail: read against the labels of other pictures it is near chance."""
    shifted = accuracies(read_pictures(IMAGES), PICTURES[1:] + PICTURES[:1])
    assert shifted["scene"] < 0.4
    assert shifted["pose"] < 0.5
    assert shifted["top"] < 0.4


def test_pictures_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 64, 64, 3\)"):
        read_pictures(np.zeros((1, 64, 64, 3), dtype=np.float32))
