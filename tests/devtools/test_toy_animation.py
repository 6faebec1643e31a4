"""The toy world in motion: clips begin and end as told, and don't take the straight way in between."""

from __future__ import annotations

import numpy as np
import pytest
from storydiffusion.devtools.toy.animation import FRAMES, Shot, Stance, film, moment, random_shot, stances_of
from storydiffusion.devtools.toy.clips import is_held_out, take
from storydiffusion.devtools.toy.figure import POSES, Kind
from storydiffusion.devtools.toy.oracle import read_pictures
from storydiffusion.devtools.toy.world import POSE_NAMES, POSITION_NAMES, POSITIONS, random_look

LOOK = random_look(np.random.default_rng(3), Kind.MAN)


def shot(start: tuple[str, float], end: tuple[str, float]) -> Shot:
    return Shot(LOOK, Stance(*start), Stance(*end), scene=0, mirrored=False)


def test_ends_are_read_as_the_stances_they_were_given() -> None:
    rng = np.random.default_rng(1)
    shots = [random_shot(rng, random_look(rng, Kind(index % 2))) for index in range(24)]
    read = read_pictures(np.concatenate([film(each, FRAMES)[[0, -1]] for each in shots]))
    stances = [stance for each in shots for stance in (each.start, each.end)]
    assert [POSE_NAMES[pose] for pose in read.pose[:, 0]] == [stance.pose for stance in stances]
    named = [POSITION_NAMES[position] for position in read.position[:, 0]]
    assert all(abs(POSITIONS[name] - stance.x) <= 1 for name, stance in zip(named, stances, strict=True))


@pytest.mark.parametrize("pose", POSE_NAMES)
def test_who_ends_as_it_began_has_moved(pose: str) -> None:
    clip = film(shot((pose, 16), (pose, 16)), FRAMES)
    assert np.array_equal(clip[0], clip[-1])
    assert np.abs(clip[1:-1] - clip[0]).max() > 0.2


def test_crossing_the_picture_takes_steps() -> None:
    across = shot(("standing", 8), ("standing", 24))
    states = [moment(across, time) for time in np.linspace(0, 1, 9)]
    assert np.all(np.diff([state.x for state in states]) > 0)
    lifted = [(state.pose.left_foot[1] < 7.5, state.pose.right_foot[1] < 7.5) for state in states]
    assert any(left for left, _ in lifted)
    assert any(right for _, right in lifted)
    assert not any(left and right for left, right in lifted)


def test_a_jump_begins_with_a_crouch_and_a_landing_is_a_jump_backwards() -> None:
    up, down = (shot((a, 16), (b, 16)) for a, b in (("standing", "jumping"), ("jumping", "standing")))
    heights = [moment(up, time).pose.lift for time in np.linspace(0, 1, 9)]
    assert min(heights) < -1
    assert heights[-1] == pytest.approx(POSES["jumping"].lift)
    np.testing.assert_array_equal(film(up, FRAMES), film(down, FRAMES)[::-1])


def test_hands_keep_their_distance_from_the_shoulder() -> None:
    """A straight way from hanging to raised would lead through the shoulder."""
    raising = shot(("standing", 16), ("cheering", 16))
    lengths = [np.hypot(*moment(raising, time).pose.right_hand) for time in np.linspace(0, 1, 9)]
    assert min(lengths) > 6


def test_no_training_clip_takes_a_way_that_is_held_out() -> None:
    training, held_out = ([take(split, number, seed=0) for number in range(300)] for split in ("training", "held out"))
    ways = [{frozenset(stances_of(each.shot)) for each in takes} for takes in (training, held_out)]
    assert not ways[0] & ways[1]  # in neither direction
    assert all(is_held_out(each.shot) for each in held_out)
    assert take("training", 7, seed=0) == training[7]
