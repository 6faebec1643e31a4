"""What Consistent Self-Attention does to a story's panels, measured in the toy world.

Every row draws the same stories from the same noise: panels of one character that differ in scene, pose and
position. A prompt says "a man" or "a woman" and nothing about colours, so that whatever agrees between panels comes
from the panels. "chance" and "perfect" are the world's own pictures, with a new look for every panel and with one
look for the story. The control deals the values of the shared tokens out among their keys anew: it pulls every
story to one mean colour, which lowers d as well, but not d / across.

    python dev.py bench consistency            all rows
    python dev.py bench consistency --quick    three rows; exit code 1 when the effect is gone
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..devtools.toy.oracle import read_pictures
from ..devtools.toy.palette import Array
from . import _consistency_routing as routing
from ._consistency_metrics import Figure, PanelPrompt, measure
from ._consistency_sampling import Painter, Sampling, Setting, rendered_stories, story_prompts

PLAIN = Setting("no CSA", rate=None)
DEFAULT = Setting("CSA, rate 0.5, decoder")
CONTROL = Setting("control: values shuffled", shuffled=True)
ROWS = (
    PLAIN,
    *(Setting(f"rate {rate}", rate=rate) for rate in (0.1, 0.3)),
    DEFAULT,
    *(Setting(f"rate {rate}", rate=rate) for rate in (0.7, 1.0)),
    CONTROL,
    Setting("all blocks", blocks="all"),
    Setting("decoder, upper level", blocks="decoder_upper_levels"),
    Setting("decoder, lower level", blocks="decoder, lower level"),
    Setting("encoder and middle", blocks="encoder and middle"),
    *(Setting(f"from {start:.0%} of the steps", start=start) for start in (0.2, 0.4)),
    *(Setting(f"up to {end:.0%} of the steps", end=end) for end in (0.2, 0.5, 0.8)),
    Setting("same noise, no CSA", rate=None, same_noise=True),
    Setting("same noise, CSA", same_noise=True),
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


def draw_row(painter: Painter, setting: Setting, prompts: Sequence[Sequence[PanelPrompt]]) -> Array:
    """All stories of a row, [stories * panels, 32, 32, 3]; the same noise for the same stories in every row."""
    begun = time.monotonic()
    images = np.concatenate([painter.draw(story, setting, seed) for seed, story in enumerate(prompts)])
    print(f"{setting.name}: {time.monotonic() - begun:.0f} s", flush=True)
    return images


def draw_casts(painter: Painter, stories: int) -> dict[str, dict[str, Figure]]:
    """The rows with two characters a story."""
    prompts = routing.cast_prompts(stories, seed=0)
    images = {setting.name: draw_row(painter, setting, prompts) for setting in routing.ROWS}
    return {name: routing.measure_cast(read_pictures(drawn), prompts) for name, drawn in images.items()}


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


def table(rows: dict[str, dict[str, Figure]], columns: dict[str, str] = COLUMNS) -> str:
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
        rows = shown.reshape(stories, panels, *shown.shape[1:]).transpose(0, 2, 1, 3, 4)
        blocks.append(rows.reshape(stories * rows.shape[1], -1, 3))
        blocks.append(np.ones((stories * rows.shape[1], 3, 3), dtype=np.float32))
    sheet = np.concatenate(blocks[:-1], axis=1).repeat(enlarged, 0).repeat(enlarged, 1)
    return Image.fromarray((sheet * 255).round().astype(np.uint8))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no CSA, CSA and control only; check the effect")
    parser.add_argument("--stories", type=int, help="stories per row (24; quick: 16)")
    parser.add_argument("--steps", type=int, help="sampling steps (50; quick: 20)")
    parser.add_argument("--out", type=Path, default=Path("output/consistency"))
    arguments = parser.parse_args()
    stories = arguments.stories or (16 if arguments.quick else 24)
    sampling = Sampling(steps=arguments.steps or (20 if arguments.quick else 50))
    torch.set_num_threads(1)  # sums in one order whatever the number of cores; and other work on the machine costs less
    painter = Painter(sampling)
    print(f"{stories} stories per row, {asdict(sampling)}, {painter.model.load_device}, torch {torch.__version__}")

    rows, images = dict(rendered_rows(stories)), {}
    for setting in (PLAIN, DEFAULT, CONTROL) if arguments.quick else ROWS:
        prompts = story_prompts(stories, setting.panels, seed=0)
        images[setting.name] = draw_row(painter, setting, prompts)
        rows[setting.name] = measure(read_pictures(images[setting.name]), prompts)
    casts = {} if arguments.quick else draw_casts(painter, stories)
    tables = "\n\n".join([table(rows), *([table(casts, routing.COLUMNS)] if casts else [])])

    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(tables + "\n")
    figures = {name: {key: asdict(value) for key, value in row.items()} for name, row in (rows | casts).items()}
    (arguments.out / "figures.json").write_text(json.dumps({"sampling": asdict(sampling), "rows": figures}, indent=1))
    contact_sheet([images[PLAIN.name], images[DEFAULT.name]]).save(arguments.out / "sheet.png")
    print(f"\n{tables}\n\nLeft without, right with CSA: {arguments.out / 'sheet.png'}")
    wrong = failures(rows)
    print("\n".join(f"FAILED: {sentence}" for sentence in wrong) or "The effect is there.")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
