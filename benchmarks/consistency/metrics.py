"""What panels have in common: numbers from pictures of the toy world, all read by its exact oracle.

Colours are sRGB on a scale of 0 to 255, distances Euclidean. A story is a row of panels of one character.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...devtools.toy.figure import Kind, Part
from ...devtools.toy.oracle import Reading, palette_of
from ...devtools.toy.scenes import SCENES
from ...devtools.toy.world import POSE_NAMES, POSITION_NAMES

Floats = NDArray[np.float64]

ATTRIBUTES: dict[str, tuple[Part, ...]] = {
    "hair": (Part.HAIR,),
    "skin": (Part.FACE,),
    "top": (Part.TOP,),
    "trousers": (Part.LEFT_LEG, Part.RIGHT_LEG),
    "shoes": (Part.LEFT_SHOE, Part.RIGHT_SHOE),
}
"""What a prompt leaves open, and the parts that show it. A woman has no trousers."""

SAME_COLOUR: tuple[tuple[Part, Part], ...] = (
    (Part.LEFT_SHOE, Part.RIGHT_SHOE),
    (Part.HAT, Part.LEFT_SHOE),
    (Part.LEFT_SLEEVE, Part.TOP),
    (Part.RIGHT_SLEEVE, Part.TOP),
    (Part.BALLOON, Part.TOP),
)
"""Pairs of parts that have one colour within any picture of the world."""


@dataclass(frozen=True)
class PanelPrompt:
    """What one panel is asked to show."""

    kind: Kind
    scene: str
    pose: str
    position: str
    description: str = ""
    """What a character sheet tells beyond "a man" or "a woman", as in "with a red hat"."""

    @property
    def text(self) -> str:
        return f"{self.subject}, {self.pose}, {self.place}"

    @property
    def subject(self) -> str:
        return f"{'a man' if self.kind == Kind.MAN else 'a woman'} {self.description}".rstrip()

    @property
    def place(self) -> str:
        scenes = {"sea": "by the sea", "night": "at night", "snow": "in the snow"}
        side = "in the middle" if self.position == "middle" else f"on the {self.position}"
        return f"{side}, {scenes.get(self.scene, f'in the {self.scene}')}"


@dataclass(frozen=True)
class Figure:
    """A measured number: mean over stories and the standard error of that mean."""

    mean: float
    error: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.error:{spec}}"


def over_stories(values: Floats) -> Figure:
    """Mean and standard error; stories without a value (NaN) don't count."""
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return Figure(float("nan"), float("nan"))
    spread = known.std(ddof=1) / np.sqrt(len(known)) if len(known) > 1 else float("nan")
    return Figure(float(known.mean()), float(spread))


def measure(reading: Reading, prompts: Sequence[Sequence[PanelPrompt]]) -> dict[str, Figure]:
    """All metrics of stories with equally many panels; `reading` holds their panels one after another."""
    stories, panels = len(prompts), len(prompts[0])
    if len(reading.scene) != stories * panels:
        raise ValueError(f"{len(reading.scene)} pictures were read, but the prompts ask for {stories * panels}.")
    colours, labels, off_palette = attributes(reading, prompts)
    distance = _between_panels(colours, lambda a, b: np.linalg.norm(a - b, axis=-1))
    across = across_stories(colours)
    same = _between_panels(labels, lambda a, b: np.where(np.isnan(a + b), np.nan, a == b))
    return {
        "d": over_stories(distance),
        "d/across": over_stories(distance / across),
        "agreement": over_stories(same),
        "off_palette": over_stories(_per_story(off_palette)),
        "residual": over_stories(reading.residual.reshape(stories, panels).mean(1)),
        **{name: over_stories(right) for name, right in _fidelity(reading, prompts).items()},
        "coherence": over_stories(_coherence(reading).reshape(stories, panels).mean(1)),
        "hat_agreement": over_stories(_hats_agree(reading.hat[:, 0].reshape(stories, panels))),
        "pose_diversity": over_stories(_distinct(reading.pose[:, 0].reshape(stories, panels))),
        "diversity": Figure(_diversity(labels), float("nan")),
    }


def attributes(reading: Reading, prompts: Sequence[Sequence[PanelPrompt]]) -> tuple[Floats, Floats, Floats]:
    """Per story, panel and attribute: colour [S, P, A, 3], nearest palette colour [S, P, A], distance to it."""
    stories, panels = len(prompts), len(prompts[0])
    all_parts = reading.colours[:, 0].astype(np.float64) * 255
    colours = np.stack([all_parts[:, list(parts)].mean(1) for parts in ATTRIBUTES.values()], axis=1)
    kinds = np.array([panel.kind for story in prompts for panel in story])
    colours[kinds == Kind.WOMAN, list(ATTRIBUTES).index("trousers")] = np.nan
    labels, apart = np.full(colours.shape[:2], np.nan), np.full(colours.shape[:2], np.nan)
    for index, parts in enumerate(ATTRIBUTES.values()):
        for kind in Kind:
            chosen = (kinds == kind) & ~np.isnan(colours[:, index, 0])
            palette = palette_of(parts[0], kind) * 255.0
            distances = np.linalg.norm(colours[chosen, index, None] - palette, axis=-1)
            labels[chosen, index], apart[chosen, index] = distances.argmin(1), distances.min(1)
    shape = (stories, panels, len(ATTRIBUTES))
    return colours.reshape(*shape, 3), labels.reshape(shape), apart.reshape(shape)


def _between_panels(values: Floats, compare: Callable[[Floats, Floats], Floats]) -> Floats:
    """Mean over all pairs of a story's panels and over attributes, [S]."""
    pairs = itertools.combinations(range(values.shape[1]), 2)
    return _per_story(np.stack([compare(values[:, a], values[:, b]) for a, b in pairs], axis=1))


def _per_story(values: Floats) -> Floats:
    """Mean over panels (or pairs) of each attribute, then over the attributes that the story has."""
    return np.nanmean(np.nanmean(values, axis=1), axis=-1) if values.size else np.zeros(0)


def across_stories(colours: Floats) -> float:
    """Mean distance between panels of different stories, attribute by attribute."""
    stories, panels = colours.shape[:2]
    flat = colours.reshape(stories * panels, -1, 3)
    owner = np.repeat(np.arange(stories), panels)
    other = owner[:, None] != owner[None]
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)[other]
    return float(np.nanmean(np.nanmean(distances, axis=0)))


def _fidelity(reading: Reading, prompts: Sequence[Sequence[PanelPrompt]]) -> dict[str, Floats]:
    """Share of panels that show what their prompt says, per story."""
    shape = (len(prompts), len(prompts[0]))
    flat = [panel for story in prompts for panel in story]
    asked = {
        "scene": (reading.scene, [SCENES.index(panel.scene) for panel in flat]),
        "pose": (reading.pose[:, 0], [POSE_NAMES.index(panel.pose) for panel in flat]),
        "position": (reading.position[:, 0], [POSITION_NAMES.index(panel.position) for panel in flat]),
        "kind": (reading.kind[:, 0], [int(panel.kind) for panel in flat]),
    }
    return {name: (read == np.array(wanted)).reshape(shape).mean(1) for name, (read, wanted) in asked.items()}


def _coherence(reading: Reading) -> Floats:
    """Distance between parts of one picture that should have one colour, mean per picture."""
    colours = reading.colours[:, 0].astype(np.float64) * 255
    pairs = [np.linalg.norm(colours[:, a] - colours[:, b], axis=-1) for a, b in SAME_COLOUR]
    return np.nanmean(np.stack(pairs, axis=1), axis=1)


def _hats_agree(hats: NDArray[np.int64]) -> Floats:
    pairs = itertools.combinations(range(hats.shape[1]), 2)
    return np.stack([hats[:, a] == hats[:, b] for a, b in pairs], axis=1).mean(1)


def _distinct(values: NDArray[np.int64]) -> Floats:
    """Distinct values per row, as a share of the row's length."""
    return np.array([len(set(row)) / len(row) for row in values.tolist()])


def _diversity(labels: Floats) -> float:
    """Entropy of the colours that occur over all stories, relative to all of them occurring equally often."""
    sizes = [len(palette_of(parts[0], Kind.MAN)) for parts in ATTRIBUTES.values()]
    entropies = []
    for index, size in enumerate(sizes):
        known = labels[..., index][~np.isnan(labels[..., index])].astype(int)
        share = np.bincount(known, minlength=size) / max(len(known), 1)
        entropies.append(-(share[share > 0] * np.log(share[share > 0])).sum() / np.log(size))
    return float(np.mean(entropies))
