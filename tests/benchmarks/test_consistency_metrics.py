"""The consistency benchmark measures what it says: known pictures give known numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from storydiffusion.benchmarks.consistency import masks, meetings, references, routing, windows
from storydiffusion.benchmarks.consistency.metrics import Figure, measure, over_stories
from storydiffusion.benchmarks.consistency.report import as_markdown, contact_sheet
from storydiffusion.benchmarks.consistency.sampling import (
    Painter,
    Sampling,
    Setting,
    ShuffledValues,
    as_story,
    rendered_stories,
    story_prompts,
)
from storydiffusion.benchmarks.consistency.tables import COLUMNS, CONTROL, DEFAULT, PLAIN, failures
from storydiffusion.devtools.toy.figure import Kind
from storydiffusion.devtools.toy.oracle import read_pictures
from storydiffusion.devtools.toy.palette import Array
from storydiffusion.devtools.toy.world import Direction, random_look, render, stage
from storydiffusion.nodes.host.noise_level import STEP_KEY, SamplingStep

PROMPTS = story_prompts(24, 4, seed=3)


def test_panels_of_a_story_differ_in_scene_and_pose() -> None:
    for story in PROMPTS:
        assert len({panel.scene for panel in story}) == 4
        assert len({panel.pose for panel in story}) == 4
        assert len({panel.position for panel in story}) == 3
        assert len({panel.kind for panel in story}) == 1


def test_one_look_per_story_measures_as_perfect() -> None:
    figures = measure(read_pictures(rendered_stories(PROMPTS, 1, one_look=True)), PROMPTS)
    assert figures["d"].mean == pytest.approx(0, abs=0.01)
    assert figures["agreement"].mean == 1
    assert figures["hat_agreement"].mean == 1
    assert figures["coherence"].mean == pytest.approx(0, abs=0.01)
    assert figures["off_palette"].mean == pytest.approx(0, abs=0.01)
    assert figures["diversity"].mean > 0.8
    assert figures["pose_diversity"].mean == 1
    assert all(figures[name].mean == 1 for name in ("scene", "pose", "position", "kind"))


def test_a_new_look_per_panel_measures_as_chance() -> None:
    figures = measure(read_pictures(rendered_stories(PROMPTS, 1, one_look=False)), PROMPTS)
    assert figures["d/across"].mean == pytest.approx(1, abs=0.1)
    # One in eight for clothes, one in five for hair, one in four for skin.
    assert figures["agreement"].mean == pytest.approx(0.16, abs=0.05)
    assert figures["hat_agreement"].mean == pytest.approx(0.5, abs=0.12)


def test_one_muddy_colour_for_all_lowers_d_but_not_d_over_across() -> None:
    images = rendered_stories(PROMPTS, 1, one_look=False)
    chance = measure(read_pictures(images), PROMPTS)
    muddy = measure(read_pictures(images * 0.5 + images.mean(0) * 0.5), PROMPTS)
    assert muddy["d"].mean < 0.7 * chance["d"].mean
    assert muddy["d/across"].mean > 0.85
    assert muddy["off_palette"].mean > 20


def test_fidelity_fails_for_the_pictures_of_other_prompts() -> None:
    images = rendered_stories(PROMPTS[1:] + PROMPTS[:1], 1, one_look=True)
    figures = measure(read_pictures(images), PROMPTS)
    assert figures["scene"].mean < 0.4
    assert figures["pose"].mean < 0.4


def test_standard_error_over_stories() -> None:
    figure = over_stories(np.array([1.0, 2.0, 3.0, np.nan]))
    assert figure.mean == 2
    assert figure.error == pytest.approx(1 / np.sqrt(3))


def test_failures_name_each_threshold() -> None:
    def row(**values: float) -> dict[str, Figure]:
        good = {"d/across": 1.0, "agreement": 0.7, "scene": 1.0}
        return {name: Figure(values.get(name.replace("/", "_"), value), 0.01) for name, value in good.items()}

    good = {PLAIN.name: row(), DEFAULT.name: row(d_across=0.3), CONTROL.name: row()}
    assert failures(good) == []
    assert len(failures({**good, DEFAULT.name: row(d_across=0.5, agreement=0.5, scene=0.97)})) == 3
    assert len(failures({**good, PLAIN.name: row(d_across=0.8)})) == 1
    assert len(failures({**good, CONTROL.name: row(d_across=0.7)})) == 1


def test_table_and_sheet() -> None:
    images = rendered_stories(PROMPTS, 1, one_look=True)
    rows = {"perfect": measure(read_pictures(images), PROMPTS)}
    assert "| perfect | 0.0 ± 0.0 |" in as_markdown(rows, COLUMNS)
    sheet = contact_sheet([images, images])
    assert sheet.size == ((2 * 4 * 33 + 3) * 4, 6 * 33 * 4)
    assert contact_sheet([images[:8]]).size == (4 * 33 * 4, 2 * 33 * 4)  # of as many stories as there are


def test_shuffled_values_leave_own_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 8, 32, generator=generator) for _ in range(3))
    options = {"n_heads": 1, "cond_or_uncond": [1, 0], STEP_KEY: SamplingStep(noise_level=3, sigma=1.0)}
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.allclose(ShuffledValues(0.0, seed=1)(q, k, v, options), attend(q, k, v), atol=1e-5)

    def both(panel: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, other = panel - panel % 2, panel ^ 1
        return torch.cat([k[panel], k[other]]), torch.cat([v[panel], v[first + other % 2]])

    shuffled = ShuffledValues(1.0, seed=1)
    exact = torch.stack([attend(q[panel], *both(panel)) for panel in range(4)])
    assert not torch.allclose(shuffled(q, k, v, options), exact, atol=1e-2)
    # All values of each panel equal: nothing to shuffle between two panels.
    v = v[:, :1].expand_as(v)
    exact = torch.stack([attend(q[panel], *both(panel)) for panel in range(4)])
    assert torch.allclose(shuffled(q, k, v, options), exact, atol=1e-5)


def test_drawing_is_deterministic_and_settings_matter() -> None:
    painter = Painter(Sampling(steps=2))
    story = as_story(PROMPTS[0][:2])
    images = {
        setting: painter.draw(story, setting, 1)
        for setting in (PLAIN, DEFAULT, CONTROL, replace(DEFAULT, blocks="encoder and middle"))
    }
    assert np.array_equal(painter.draw(story, DEFAULT, 1), images[DEFAULT])
    plain = images.pop(PLAIN)
    assert all(np.abs(image - plain).max() > 1e-3 for image in images.values())
    assert np.allclose(painter.draw(story, Setting("rate 0", rate=0.0), 1), plain, atol=1e-6)


def test_routing_tells_own_from_other() -> None:
    prompts = routing.cast_prompts(24, seed=3)
    # Each character's panels with one look, then the two put back in turn.
    drawn = [rendered_stories([story[first::2] for story in prompts], first, one_look=True) for first in (0, 1)]
    images = np.stack([pictures.reshape(24, 2, 32, 32, 3) for pictures in drawn], axis=2).reshape(96, 32, 32, 3)
    figures = routing.measure_cast(read_pictures(images), prompts)
    assert figures["agreement, own"].mean == 1
    assert figures["d/across, own"].mean == pytest.approx(0, abs=0.01)
    assert figures["agreement, other"].mean == pytest.approx(0.18, abs=0.07)
    assert figures["d/across, other"].mean == pytest.approx(1, abs=0.15)
    assert figures["kind"].mean == figures["scene"].mean == 1
    # Rendered hats are of any colour, and every second figure has one.
    assert figures["red hat, man"].mean < 0.25
    assert set(routing.COLUMNS) == set(figures)
    assert [panel.text.startswith("a man with a red hat, ") for panel in prompts[0]] == [True, False, True, False]


@pytest.mark.slow
def test_panels_of_two_characters_share_only_with_their_own() -> None:
    """With `routed`, what the woman's panels hold does not touch the man's."""
    painter = Painter(Sampling(steps=2))
    story = routing.cast_prompts(1, seed=0)[0]
    other = [*story]
    other[1::2] = [replace(panel, scene="night", pose="cheering") for panel in story[1::2]]
    for setting, touched in ((routing.ROWS[1], True), (routing.ROWS[2], False)):
        first, second = (painter.draw(as_story(panels), setting, 1)[::2] for panels in (story, other))
        assert np.allclose(first, second, atol=1e-5) != touched


def test_a_meeting_of_rendered_pictures_measures_as_drawn() -> None:
    """Each character with one look all through its story: nothing of its own changes, nothing of the other comes in."""
    told = meetings.meetings(12, seed=3)
    rng = np.random.default_rng(0)
    images = []
    for story in told:
        looks = [random_look(rng, kind) for kind in Kind]
        alone = [Direction(look.kind, "standing", "middle") for look in looks]
        both = [Direction(look.kind, "standing", side) for look, side in zip(looks, ("left", "right"), strict=True)]
        casts = [(alone[:1], looks[:1]), (alone[1:], looks[1:]), (both, looks), (both, looks)]
        images += [render(stage(rng, scene, *cast)) for scene, cast in zip(story.scenes, casts, strict=True)]
    figures = meetings.measure_meetings(read_pictures(np.stack(images)), told)
    assert figures["d/across, own"].mean == pytest.approx(0, abs=0.01)
    assert figures["agreement, own"].mean == figures["both there"].mean == figures["scene"].mean == 1
    assert figures["d/across, other"].mean == pytest.approx(1, abs=0.2)
    assert set(meetings.COLUMNS) == set(figures)
    assert told[0].story.panels[2].subjects == {"Bob": "a man", "Ann": "a woman"}


def met_in_the_world() -> Array:
    """One rendered picture with a man on the left and a woman on the right, (1, 32, 32, 3)."""
    rng = np.random.default_rng(2)
    looks = [random_look(rng, kind) for kind in Kind]
    both = [Direction(look.kind, "standing", side) for look, side in zip(looks, ("left", "right"), strict=True)]
    return render(stage(rng, "sea", both, looks))[None]


@pytest.mark.parametrize("size", masks.SIZES)
def test_masks_are_measured_against_who_stands_where(size: int) -> None:
    reading = read_pictures(met_in_the_world())
    truth = torch.from_numpy(masks.figures(reading, size)).view(1, size, size)
    assert set(truth.unique().tolist()) == {masks.BACKGROUND, 0, 1}
    assert (truth[..., size // 2 :] != 0).all()
    assert (truth[..., : size // 2] != 1).all()
    perfect = torch.stack([truth == 0, truth == 1], dim=1).float()

    def measured(maps: torch.Tensor) -> list[float]:
        return masks.mask_shares([maps], lambda maps: maps, reading, size).tolist()

    assert measured(perfect) == [1, 0, 0]
    assert measured(perfect.flip(1)) == [0, 1, 0]
    halves = torch.zeros(1, 2, size, size)
    halves[:, 0, :, : size // 2] = halves[:, 1, :, size // 2 :] = 1
    assert measured(halves) == [1, 0, 1]


def test_masks_are_those_of_every_step() -> None:
    figures = masks.measure_masks(Painter(Sampling(steps=2)), meetings.meetings(1, seed=3))
    assert list(figures) == list(masks.ROWS)
    for row in figures.values():
        assert list(row) == list(masks.COLUMNS)
    words, *_, shipped = figures.values()
    assert shipped["right, 16 x 16"].mean > words["right, 16 x 16"].mean + 0.2


def test_windows_measure_the_way_back_to_the_first_panel() -> None:
    prompts = story_prompts(4, 8, seed=3)
    perfect = rendered_stories(prompts, 1, one_look=True).reshape(4, 8, 32, 32, 3)
    drifted = perfect.copy()
    drifted[:, -4:] = np.roll(perfect, 2, axis=0)[:, -4:]  # a look of another story, of the same kind
    near, far = (
        windows.measure_windows(read_pictures(images.reshape(32, 32, 32, 3)), prompts) for images in (perfect, drifted)
    )
    assert near["first to last"].mean == pytest.approx(0, abs=0.01)
    assert far["first to last"].mean > 0.6
    assert far["first to others"].mean == pytest.approx(far["first to last"].mean * 4 / 7, abs=0.05)


def test_references_measure_the_distance_to_the_given_picture() -> None:
    prompts = story_prompts(6, 4, seed=3)
    given = [references.reference_for(story, seed) for seed, story in enumerate(prompts)]
    pictures = np.concatenate([reference.pictures for reference in given])
    # Panels that are the reference itself have its looks; those of the world's own choice don't.
    figures = references.measure_references(read_pictures(pictures.repeat(4, axis=0)), prompts, pictures)
    assert figures["to reference / across"].mean == pytest.approx(0, abs=0.01)
    assert figures["agreement with reference"].mean == 1
    free = rendered_stories(prompts, 1, one_look=False)
    figures = references.measure_references(read_pictures(free), prompts, pictures)
    assert figures["to reference / across"].mean == pytest.approx(1, abs=0.25)
    assert given[0].lines.startswith(("[Man] standing, in the middle", "[Woman] standing, in the middle"))


@pytest.mark.parametrize("knob", [{"window": 2}, {"window": 2, "anchors": False}, {"token_choice": "grid"}])
def test_every_knob_reaches_the_model(knob: dict[str, Any]) -> None:
    painter = Painter(Sampling(steps=1))
    story = as_story(PROMPTS[0])
    plain, turned = (painter.draw(story, setting, 1) for setting in (DEFAULT, replace(DEFAULT, **knob)))
    assert np.abs(plain - turned).max() > 1e-3
