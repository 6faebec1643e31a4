"""What Consistent Self-Attention does to a story's panels, measured in the toy world.

Every row draws the same stories from the same noise: panels of one character that differ in scene, pose and
position. A prompt says "a man" or "a woman" and nothing about colours, so that whatever agrees between panels comes
from the panels. "chance" and "perfect" are the world's own pictures, with a new look for every panel and with one
look for the story. The control deals the values of the shared tokens out among their keys anew: it pulls every
story to one mean colour, which lowers d as well, but not d / across.

    python dev.py bench consistency                        all tables
    python dev.py bench consistency --tables rates knobs   some of them
    python dev.py bench consistency --quick                three rows; exit code 1 when the effect is gone
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..devtools.toy.oracle import read_pictures
from ..devtools.toy.palette import Array
from ..nodes.story_text import Story
from . import _consistency_masks as masks
from . import _consistency_meetings as meetings
from . import _consistency_references as references
from . import _consistency_routing as routing
from . import _consistency_windows as windows
from ._consistency_metrics import Figure, measure
from ._consistency_sampling import Painter, References, Sampling, Setting, as_story, rendered_stories, story_prompts

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


@dataclass
class Table:
    """Rows that are measured alike."""

    columns: dict[str, str]
    """Each metric's number format."""
    rows: dict[str, dict[str, Figure]] = field(default_factory=dict)
    images: dict[str, Array] = field(default_factory=dict)


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


def as_markdown(rows: dict[str, dict[str, Figure]], columns: dict[str, str] = COLUMNS) -> str:
    """The rows as a Markdown table; `columns` gives each metric's number format."""
    lines = ["| setting | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in rows.items():
        cells = (_cell(figures[column], spec) for column, spec in columns.items())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: Figure, spec: str) -> str:
    return f"{figure.mean:{spec}}" if np.isnan(figure.error) else f"{figure:{spec}}"


def contact_sheet(columns: Sequence[Array], *, stories: int = 6, panels: int = 4, enlarged: int = 4) -> Image.Image:
    """Stories as rows; one block of panels per entry of `columns`, side by side."""
    blocks = []
    for images in columns:
        shown = np.pad(images[: stories * panels], ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=1)
        rows = shown.reshape(-1, panels, *shown.shape[1:]).transpose(0, 2, 1, 3, 4)
        blocks.append(rows.reshape(len(rows) * rows.shape[1], -1, 3))
        blocks.append(np.ones((len(rows) * rows.shape[1], 3, 3), dtype=np.float32))
    sheet = np.concatenate(blocks[:-1], axis=1).repeat(enlarged, 0).repeat(enlarged, 1)
    return Image.fromarray((sheet * 255).round().astype(np.uint8))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no CSA, CSA and control only; check the effect")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--stories", type=int, default=16, help="stories of four panels per row")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--out", type=Path, default=Path("output/consistency"))
    arguments = parser.parse_args()
    sampling = Sampling(steps=arguments.steps)
    torch.set_num_threads(1)  # sums in one order whatever the number of cores; and other work on the machine costs less
    painter = Painter(sampling)
    stories = arguments.stories
    print(f"{stories} stories per row, {asdict(sampling)}, {painter.model.load_device}, torch {torch.__version__}")
    arguments.out.mkdir(parents=True, exist_ok=True)

    if arguments.quick:
        tables = {"quick": draw_stories(painter, (PLAIN, DEFAULT, CONTROL), stories)}
        tables["quick"].rows = dict(rendered_rows(stories)) | tables["quick"].rows
    else:
        tables = {name: TABLES[name](painter, stories) for name in arguments.tables}
    for name, drawn in tables.items():
        save(drawn, arguments.out, name, sampling)
    checked = tables.get("quick") or tables.get("rates")
    if checked is None:
        return 0
    sheet = contact_sheet([checked.images[PLAIN.name], checked.images[DEFAULT.name]])
    sheet.save(arguments.out / "sheet.png")
    print(f"Left without, right with CSA: {arguments.out / 'sheet.png'}")
    wrong = failures(checked.rows)
    print("\n".join(f"FAILED: {sentence}" for sentence in wrong) or "The effect is there.")
    return 1 if wrong else 0


def save(table: Table, folder: Path, name: str, sampling: Sampling) -> None:
    """Print a table and write it, as Markdown, as numbers, and as a sheet of its pictures."""
    text = as_markdown(table.rows, table.columns)
    print(f"\n{name}\n\n{text}\n", flush=True)
    (folder / f"{name}.md").write_text(text + "\n")
    figures = {row: {key: asdict(value) for key, value in known.items()} for row, known in table.rows.items()}
    (folder / f"{name}.json").write_text(json.dumps({"sampling": asdict(sampling), "rows": figures}, indent=1))
    if table.images:
        contact_sheet(list(table.images.values())[:4], panels=4).save(folder / f"{name}.png")


if __name__ == "__main__":
    raise SystemExit(main())
