"""Two characters in one story: does each stay itself, and does one leak into the other?

Panels show the man and the woman in turn. The sheet says that the man has a red hat and nothing about the woman.
Within a character panels should agree; between the two they should not, more than those of different stories do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from ...devtools.toy.figure import Kind, Part
from ...devtools.toy.oracle import Reading
from ...devtools.toy.palette import CLOTHES, CLOTHES_RGB
from ...devtools.toy.scenes import SCENES
from .metrics import Figure, Floats, PanelPrompt, across_stories, attributes, over_stories
from .sampling import Setting, story_prompts

ROWS = (
    Setting("no CSA", rate=None),
    Setting("all panels share"),
    Setting("each character with itself", routed=True),
)
COLUMNS = {
    "d/across, own": ".2f",
    "d/across, other": ".2f",
    "agreement, own": ".2f",
    "agreement, other": ".2f",
    "red hat, man": ".2f",
    "red hat, woman": ".2f",
    "kind": ".3f",
    "scene": ".3f",
}


def cast_prompts(stories: int, seed: int) -> list[list[PanelPrompt]]:
    """Stories of four panels: the man, the woman, the man, the woman."""
    told = {Kind.MAN: "with a red hat", Kind.WOMAN: ""}
    kinds = (Kind.MAN, Kind.WOMAN, Kind.MAN, Kind.WOMAN)
    return [
        [replace(panel, kind=kind, description=told[kind]) for panel, kind in zip(story, kinds, strict=True)]
        for story in story_prompts(stories, len(kinds), seed)
    ]


def measure_cast(reading: Reading, prompts: Sequence[Sequence[PanelPrompt]]) -> dict[str, Figure]:
    """Metrics within a character ("own") and between the two ("other")."""
    colours, labels, _ = attributes(reading, prompts)
    across = across_stories(colours)
    kinds = np.array([[panel.kind for panel in story] for story in prompts])
    pairs = list(combinations(range(kinds.shape[1]), 2))
    own = [pair for pair in pairs if kinds[0, pair[0]] == kinds[0, pair[1]]]
    other = [pair for pair in pairs if pair not in own]
    figures = {}
    for name, chosen in (("own", own), ("other", other)):
        apart = np.stack([np.linalg.norm(colours[:, a] - colours[:, b], axis=-1) for a, b in chosen], axis=1)
        same = np.stack([_equal(labels[:, a], labels[:, b]) for a, b in chosen], axis=1)
        figures[f"d/across, {name}"] = over_stories(np.nanmean(apart, axis=(1, 2)) / across)
        figures[f"agreement, {name}"] = over_stories(np.nanmean(same, axis=(1, 2)))
    red_hat = _red_hats(reading).reshape(kinds.shape)
    scenes = np.array([[panel.scene for panel in story] for story in prompts])
    for kind in Kind:
        figures[f"red hat, {kind.name.lower()}"] = over_stories(red_hat[:, kinds[0] == kind].mean(1))
    figures["kind"] = over_stories((reading.kind[:, 0].reshape(kinds.shape) == kinds).mean(1))
    figures["scene"] = over_stories((_scene_names(reading).reshape(scenes.shape) == scenes).mean(1))
    return figures


def _equal(first: Floats, second: Floats) -> Floats:
    return np.where(np.isnan(first + second), np.nan, first == second)


def _red_hats(reading: Reading) -> Floats:
    """1 for a picture whose figure wears a hat nearer to red than to any other colour."""
    colours = reading.colours[:, 0, Part.HAT]
    nearest = np.linalg.norm(np.nan_to_num(colours)[:, None] - CLOTHES_RGB, axis=-1).argmin(1)
    return ((reading.hat[:, 0] == 1) & (nearest == tuple(CLOTHES).index("red"))).astype(np.float64)


def _scene_names(reading: Reading) -> np.ndarray:
    return np.array(SCENES)[reading.scene]
