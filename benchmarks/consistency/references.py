"""Reference panels: is the figure of the reference the figure of the story?

The reference is a picture of the world, a figure of a look of its own that stands before a scene which the story
doesn't visit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...devtools.toy.oracle import Reading, read_pictures
from ...devtools.toy.palette import Array
from ...devtools.toy.scenes import SCENES
from ...devtools.toy.world import Direction, random_look, render, stage
from .metrics import Figure, PanelPrompt, across_stories, attributes, measure, over_stories
from .sampling import References, Setting

ROWS = (
    Setting("no CSA", rate=None),
    *(Setting(f"CSA, weight {weight}", routed=True, reference_weight=weight) for weight in (1, 2, 3, 4)),
    *(
        Setting(f"CSA, subjects only, weight {weight}", routed=True, share="subjects", reference_weight=weight)
        for weight in (2, 4)
    ),
)
COLUMNS = {
    "to reference / across": ".2f",
    "agreement with reference": ".2f",
    "d/across": ".2f",
    "agreement": ".2f",
    "residual": ".3f",
    "scene": ".3f",
    "pose": ".3f",
}


def reference_for(story: Sequence[PanelPrompt], seed: int) -> References:
    """One picture of the story's character."""
    rng = np.random.default_rng([seed, 7])
    kind, subject = story[0].kind, story[0].subject
    scene = next(name for name in SCENES if name not in {panel.scene for panel in story})
    place = PanelPrompt(kind, scene, "standing", "middle")
    picture = render(stage(rng, scene, [Direction(kind, "standing", "middle")], [random_look(rng, kind)]))
    name = kind.name.title()
    return References(picture[None], f"[{name}] standing, {place.place}", f"[{name}] {subject}")


def measure_references(
    reading: Reading, prompts: Sequence[Sequence[PanelPrompt]], pictures: Array
) -> dict[str, Figure]:
    """Distance from the panels to their story's reference picture, relative to that between stories."""
    colours, labels, _ = attributes(reading, prompts)
    given, given_labels, _ = attributes(read_pictures(pictures), [story[:1] for story in prompts])
    apart = np.nanmean(np.linalg.norm(colours - given, axis=-1), axis=(1, 2))
    same = np.where(np.isnan(labels + given_labels), np.nan, labels == given_labels)
    return {
        **measure(reading, prompts),
        "to reference / across": over_stories(apart / across_stories(colours)),
        "agreement with reference": over_stories(np.nanmean(same, axis=(1, 2))),
    }
