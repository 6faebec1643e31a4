"""The toy world draws what it is told, the same every time, and its prompts say what they should."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from storydiffusion.devtools.toy.captions import caption
from storydiffusion.devtools.toy.figure import POSES, Kind, Part, blend, draw_figure
from storydiffusion.devtools.toy.palette import CLOTHES, CLOTHES_RGB
from storydiffusion.devtools.toy.scenes import SCENES
from storydiffusion.devtools.toy.world import (
    POSE_NAMES,
    POSITIONS,
    Actor,
    Direction,
    Look,
    Picture,
    random_example,
    render,
)

LOOK = Look(Kind.MAN, hat=True, hair=0, skin=1, top=4, trousers=1, accent=0)


def test_one_seed_gives_one_example() -> None:
    first, second = (random_example(np.random.default_rng(5)) for _ in range(2))
    assert first == second
    assert np.array_equal(render(first[3]), render(second[3]))


def test_hat_shoes_and_balloon_carry_their_colours() -> None:
    image = render(Picture(0, mirrored=False, actors=(Actor(LOOK, POSES["standing"], POSITIONS["left"]),)))
    figure = draw_figure(Kind.MAN, POSES["standing"], hat=True, x=POSITIONS["left"])
    for part, colour in ((Part.HAT, 0), (Part.LEFT_SHOE, 0), (Part.RIGHT_SHOE, 0), (Part.TOP, 4)):
        assert np.allclose(image[figure == part], CLOTHES_RGB[colour]), part
    # The balloon flies far to the right of a figure on the left.
    assert np.allclose(image[5, 28], CLOTHES_RGB[4])


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("pose", POSE_NAMES)
def test_a_figure_has_all_its_parts_and_keeps_to_its_half(kind: Kind, pose: str) -> None:
    figure = draw_figure(kind, POSES[pose], hat=True, x=POSITIONS["left"])
    # A dress hides the legs of a jumping woman.
    hidden = {Part.LEFT_LEG, Part.RIGHT_LEG} if kind == Kind.WOMAN and pose == "jumping" else set()
    assert set(np.unique(figure)) == set(Part) - {Part.BALLOON} - hidden
    # A jumping figure's hand reaches one pixel over the middle.
    assert not figure[:, 16:].any() or (pose == "jumping" and set(np.unique(figure[:, 16:])) <= {0, Part.HAND})
    assert not figure[:, 17:].any()


def test_frames_between_two_poses_move_little_by_little() -> None:
    frames = [
        draw_figure(Kind.WOMAN, blend(POSES["standing"], POSES["waving"], step / 12), hat=False, x=16)
        for step in range(13)
    ]
    changed = [np.count_nonzero(a != b) for a, b in pairwise(frames)]
    whole = np.count_nonzero(frames[0] != frames[-1])
    assert whole > 10
    assert max(changed) < whole
    assert np.array_equal(frames[-1], draw_figure(Kind.WOMAN, POSES["waving"], hat=False, x=16))


def test_captions_tell_what_is_described_and_no_other_colour() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        scene, directions, looks, _ = random_example(rng)
        words = set(caption(scene, directions, looks, rng).replace(",", " ").replace(".", " ").split())
        told = {
            name
            for direction, look in zip(directions, looks, strict=True)
            for field, name in _clothes_named(direction, look)
            if field in direction.described
        }
        assert words & set(CLOTHES) == told


def _clothes_named(direction: Direction, look: Look) -> list[tuple[str, str]]:
    colours = tuple(CLOTHES)
    indices = {"hat": look.accent, "accent": look.accent, "top": look.top, "trousers": look.trousers}
    return [(field, colours[index]) for field, index in indices.items() if field in direction.described]


def test_a_described_hat_is_worn() -> None:
    rng = np.random.default_rng(4)
    described = [
        look.hat
        for _ in range(300)
        for _, directions, looks, _ in [random_example(rng)]
        for direction, look in zip(directions, looks, strict=True)
        if "hat" in direction.described
    ]
    assert described
    assert all(described)


def test_the_hat_is_free_otherwise() -> None:
    rng = np.random.default_rng(4)
    free = [
        look.hat
        for _ in range(300)
        for _, directions, looks, _ in [random_example(rng)]
        for direction, look in zip(directions, looks, strict=True)
        if "hat" not in direction.described
    ]
    assert 0.4 < np.mean(free) < 0.6


def test_scenes_differ_from_each_other_and_from_their_mirror_image() -> None:
    actor = Actor(replace(LOOK, hat=False), POSES["standing"], POSITIONS["middle"])
    pictures = [render(Picture(scene, side, (actor,))) for scene in range(len(SCENES)) for side in (False, True)]
    for index, picture in enumerate(pictures):
        assert all(np.abs(picture - other).mean() > 0.01 for other in pictures[:index])
