"""The benchmark's tables: which rows each has, and whether the effect is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ...devtools.toy.oracle import read_pictures
from ...devtools.toy.palette import Array
from ...nodes.story.model import Story
from . import masks, meetings, references, routing, windows
from .metrics import Figure, measure
from .report import Table
from .sampling import Painter, References, Setting, as_story, rendered_stories, story_prompts

PLAIN = Setting("no CSA", rate=None)
DEFAULT = Setting("CSA, rate 0.5, decoder")
CONTROL = Setting("control: values shuffled", shuffled=True)
RATES = (
    PLAIN,
    *(Setting(f"rate {rate}", rate=rate) for rate in (0.1, 0.3)),
    DEFAULT,
    *(Setting(f"rate {rate}", rate=rate) for rate in (0.7, 1.0)),
    CONTROL,
)
PLACES = (
    Setting("all blocks", blocks="all"),
    Setting("decoder, upper level", blocks="decoder_upper_levels"),
    Setting("decoder, lower level", blocks="decoder, lower level"),
    Setting("encoder and middle", blocks="encoder and middle"),
    Setting("upper level 0.5, lower 0.2", level_rates="4: 0.2"),
    Setting("upper level 0.2, lower 0.5", level_rates="2: 0.2"),
    *(Setting(f"from {start:.0%} of the steps", start=start) for start in (0.2, 0.4)),
    *(Setting(f"up to {end:.0%} of the steps", end=end) for end in (0.2, 0.5, 0.8)),
)
KNOBS = (
    *(Setting(f"strength {strength}", strength=strength) for strength in (0.25, 0.5, 0.75)),
    Setting("grid", token_choice="grid"),
    Setting("subjects only", routed=True, share="subjects"),
    Setting("a seed per panel, no CSA", rate=None, own_seeds=True),
    Setting("a seed per panel", own_seeds=True),
    Setting("same noise, no CSA", rate=None, same_noise=True),
    Setting("same noise", same_noise=True),
    Setting("2 panels", panels=2),
    Setting("8 panels, no CSA", rate=None, panels=8),
    Setting("8 panels", panels=8),
)
COLUMNS = {
    "d": ".1f",
    "d/across": ".2f",
    "agreement": ".2f",
    "off_palette": ".1f",
    "residual": ".3f",
    "scene": ".3f",
    "pose": ".3f",
    "position": ".3f",
    "kind": ".3f",
    "coherence": ".1f",
    "hat_agreement": ".2f",
    "pose_diversity": ".2f",
    "diversity": ".2f",
}


def draw(
    painter: Painter, setting: Setting, stories: Sequence[Story], given: Sequence[References | None] | None = None
) -> Array:
    """All stories of a row, [stories * panels, 32, 32, 3]; the same noise for the same stories in every row."""
    begun = time.monotonic()
    pairs = zip(stories, given or [None] * len(stories), strict=True)
    images = np.concatenate([painter.draw(story, setting, seed, own) for seed, (story, own) in enumerate(pairs)])
    print(f"{setting.name}: {time.monotonic() - begun:.0f} s", flush=True)
    return images


def draw_stories(painter: Painter, settings: Sequence[Setting], stories: int) -> Table:
    """Rows of stories with one character."""
    table = Table(COLUMNS)
    for setting in settings:
        prompts = story_prompts(stories, setting.panels, seed=0)
        table.images[setting.name] = draw(painter, setting, [as_story(story) for story in prompts])
        table.rows[setting.name] = measure(read_pictures(table.images[setting.name]), prompts)
    return table


def draw_rates(painter: Painter, stories: int) -> Table:
    """The main table: the ends of the scale, no CSA, sampling rates, the control."""
    table = draw_stories(painter, RATES, stories)
    table.rows = dict(rendered_rows(stories)) | table.rows
    return table


def draw_casts(painter: Painter, stories: int) -> Table:
    """Two characters a story, one a panel."""
    table, prompts = Table(routing.COLUMNS), routing.cast_prompts(stories, seed=0)
    for setting in routing.ROWS:
        images = draw(painter, setting, [as_story(story) for story in prompts])
        table.rows[setting.name] = routing.measure_cast(read_pictures(images), prompts)
    return table


def draw_meetings(painter: Painter, stories: int) -> Table:
    """Two characters in one panel."""
    table, told = Table(meetings.COLUMNS), meetings.meetings(stories, seed=0)
    for setting in meetings.ROWS:
        shown = [one.with_masks() for one in told] if setting.name == meetings.GIVEN_MASKS else told
        table.images[setting.name] = draw(painter, setting, [one.story for one in shown])
        table.rows[setting.name] = meetings.measure_meetings(read_pictures(table.images[setting.name]), told)
    return table


def draw_masks(painter: Painter, stories: int) -> Table:
    """Where the model sees the two who meet."""
    return Table(masks.COLUMNS, masks.measure_masks(painter, meetings.meetings(stories, seed=0)))


def draw_windows(painter: Painter, stories: int) -> Table:
    """Long stories."""
    table = Table(windows.COLUMNS)
    for setting in windows.ROWS:
        prompts = story_prompts(max(stories * 4 // setting.panels, 2), setting.panels, seed=0)
        images = draw(painter, setting, [as_story(story) for story in prompts])
        table.rows[setting.name] = windows.measure_windows(read_pictures(images), prompts)
    return table


def draw_references(painter: Painter, stories: int) -> Table:
    """Stories after a given picture."""
    table, prompts = Table(references.COLUMNS), story_prompts(stories, 4, seed=0)
    given = [references.reference_for(story, seed) for seed, story in enumerate(prompts)]
    pictures = np.concatenate([reference.pictures for reference in given])
    for setting in references.ROWS:
        images = draw(painter, setting, [as_story(story) for story in prompts], given)
        table.rows[setting.name] = references.measure_references(read_pictures(images), prompts, pictures)
    return table


TABLES: dict[str, Callable[[Painter, int], Table]] = {
    "rates": draw_rates,
    "places": lambda painter, stories: draw_stories(painter, PLACES, stories),
    "knobs": lambda painter, stories: draw_stories(painter, KNOBS, stories),
    "casts": draw_casts,
    "meetings": draw_meetings,
    "masks": draw_masks,
    "windows": draw_windows,
    "references": draw_references,
}


def rendered_rows(stories: int) -> Iterator[tuple[str, dict[str, Figure]]]:
    """The ends of the scale, on as many stories as the others."""
    prompts = story_prompts(stories, 4, seed=0)
    for name, one_look in (("chance (rendered)", False), ("perfect (rendered)", True)):
        yield name, measure(read_pictures(rendered_stories(prompts, seed=1, one_look=one_look)), prompts)


def failures(rows: dict[str, dict[str, Figure]]) -> list[str]:
    """What is wrong with the effect, in sentences; empty when it is there."""
    plain, default, control = (rows[setting.name] for setting in (PLAIN, DEFAULT, CONTROL))
    conditions = (
        (plain["d/across"].mean > 0.9, "without CSA, d/across is not above 0.9"),
        (default["d/across"].mean < 0.45, "with CSA, d/across is not below 0.45"),
        (default["agreement"].mean > 0.55, "with CSA, agreement is not above 0.55"),
        (default["scene"].mean >= 0.98, "with CSA, fewer than 98% of the scenes are right"),
        (control["d/across"].mean > 0.8, "with shuffled values, d/across is not above 0.8"),
    )
    return [sentence for holds, sentence in conditions if not holds]
