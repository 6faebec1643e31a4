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
from dataclasses import asdict
from pathlib import Path

import torch

from .report import contact_sheet, save
from .sampling import Painter, Sampling
from .tables import CONTROL, DEFAULT, PLAIN, TABLES, draw_stories, failures, rendered_rows


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


if __name__ == "__main__":
    raise SystemExit(main())
