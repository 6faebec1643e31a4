"""Two characters in one picture: does each keep its own colours, or do they lend them to one another?

A story has four panels: the man alone, the woman alone, and twice both, the man on the left. Nothing is told of either
but what it is. "own": a character in a picture with both, against itself alone; it should be alike. "other": against
the *other* one alone; more alike than without sharing is leakage. Only pictures that show both where they should count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...devtools.toy.figure import Kind
from ...devtools.toy.oracle import Reading, palette_of
from ...devtools.toy.scenes import SCENES
from ...nodes.story.model import Story
from ...nodes.story.parser import parse_story
from .metrics import ATTRIBUTES, Figure, Floats, PanelPrompt, over_stories
from .sampling import Setting

ROWS = (
    Setting("no CSA", rate=None),
    Setting("all panels share"),
    Setting("routed by panel", routed=True, masks=False),
    Setting("routed by token", routed=True),
    Setting("routed by token, subjects only", routed=True, share="subjects"),
    Setting("routed by token, given masks", routed=True),
)
GIVEN_MASKS = ROWS[-1].name
COLUMNS = {
    "d/across, own": ".2f",
    "d/across, other": ".2f",
    "agreement, own": ".2f",
    "agreement, other": ".2f",
    "both there": ".2f",
    "scene": ".3f",
}
BOTH = ("hair", "skin", "top", "shoes")
"""Attributes that the man and the woman have in common."""


@dataclass(frozen=True)
class Meeting:
    """A story to draw, and the scenes of its panels."""

    story: Story
    scenes: tuple[str, ...]

    def with_masks(self) -> Meeting:
        """Masks as a user would paint them: halves where both stand, the whole picture where one does."""
        left = torch.zeros(32, 32)
        left[:, :16] = 1
        whole = torch.ones(32, 32)
        masks = [{"Bob": whole}, {"Ann": whole}, *[{"Bob": left, "Ann": 1 - left}] * 2]
        panels = (replace(panel, masks=own) for panel, own in zip(self.story.panels, masks, strict=True))
        return replace(self, story=replace(self.story, panels=tuple(panels)))


def meetings(stories: int, seed: int) -> list[Meeting]:
    """Stories of four panels in four scenes."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(stories):
        scenes = tuple(SCENES[index] for index in rng.permutation(len(SCENES))[:4])
        places = [PanelPrompt(Kind.MAN, scene, "", "middle").place.split(", ")[1] for scene in scenes]
        lines = [
            f"[Bob] standing, in the middle, {places[0]}",
            f"[Ann] standing, in the middle, {places[1]}",
            f"[Bob] [Ann] standing, {places[2]}",
            f"[Bob] [Ann] standing, {places[3]}",
        ]
        found.append(Meeting(parse_story("\n".join(lines), "[Bob] a man\n[Ann] a woman"), scenes))
    return found


def measure_meetings(reading: Reading, stories: Sequence[Meeting]) -> dict[str, Figure]:
    """Metrics of the drawn stories, panels one after another."""
    count = len(stories)
    colours, labels = _figures(reading, count)  # [S, panel, figure, attribute(, 3)]
    kind = reading.kind.reshape(count, 4, 2)
    alone = (reading.figures.reshape(count, 4)[:, :2] == 1) & (kind[:, :2, 0] == [Kind.MAN, Kind.WOMAN])
    both = (reading.figures.reshape(count, 4)[:, 2:] == 2) & (kind[:, 2:] == [Kind.MAN, Kind.WOMAN]).all(-1)
    seen = both & alone.all(1, keepdims=True)
    across = _across(colours[:, :2, 0], alone)
    figures = {}
    for name, other in (("own", False), ("other", True)):
        apart, same = [], []
        for panel in (2, 3):
            for figure in (0, 1):
                single = 1 - figure if other else figure
                use = seen[:, panel - 2]
                distance = np.linalg.norm(colours[:, panel, figure] - colours[:, single, 0], axis=-1).mean(-1)
                equal = (labels[:, panel, figure] == labels[:, single, 0]).mean(-1)
                apart.append(np.where(use, distance, np.nan))
                same.append(np.where(use, equal, np.nan))
        figures[f"d/across, {name}"] = over_stories(_mean(apart) / across)
        figures[f"agreement, {name}"] = over_stories(_mean(same))
    figures["both there"] = over_stories(both.mean(1))
    asked = np.array([[SCENES.index(scene) for scene in story.scenes] for story in stories])
    figures["scene"] = over_stories((reading.scene.reshape(count, 4) == asked).mean(1))
    return figures


def _mean(values: Sequence[Floats]) -> Floats:
    """Mean of the known values, story by story; NaN for a story without any."""
    stacked = np.stack(values)
    known = ~np.isnan(stacked)
    return np.where(known.any(0), np.nansum(stacked, 0) / np.maximum(known.sum(0), 1), np.nan)


def _figures(reading: Reading, stories: int) -> tuple[Floats, Floats]:
    parts = [list(ATTRIBUTES[name]) for name in BOTH]
    every = reading.colours.astype(np.float64) * 255
    colours = np.stack([every[:, :, own].mean(2) for own in parts], axis=2)  # [n, figure, attribute, 3]
    labels = np.full(colours.shape[:-1], -1.0)
    for index, own in enumerate(parts):
        palette = palette_of(own[0], Kind.MAN) * 255.0
        labels[..., index] = np.linalg.norm(colours[..., index, None, :] - palette, axis=-1).argmin(-1)
    return colours.reshape(stories, 4, 2, len(BOTH), 3), labels.reshape(stories, 4, 2, len(BOTH))


def _across(single: Floats, alone: np.ndarray) -> float:
    """Mean distance between characters of different stories, [S, character, attribute, 3]."""
    flat, owner = single[alone], np.nonzero(alone)[0]
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1).mean(-1)
    return float(distances[owner[:, None] != owner[None]].mean())
