"""Long stories in windows: is the last panel still the first panel's character?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...devtools.toy.oracle import Reading
from .metrics import Figure, PanelPrompt, across_stories, attributes, measure, over_stories
from .sampling import Setting

WINDOW = 4
ROWS = tuple(
    setting
    for panels in (16, 32)
    for setting in (
        Setting(f"{panels} panels, no CSA", rate=None, panels=panels),
        Setting(f"{panels} panels, one batch", panels=panels),
        Setting(f"{panels} panels, windows of {WINDOW}", panels=panels, window=WINDOW),
        Setting(f"{panels} panels, windows of {WINDOW}, no anchors", panels=panels, window=WINDOW, anchors=False),
    )
)
COLUMNS = {
    "d/across": ".2f",
    "agreement": ".2f",
    "first to last": ".2f",
    "first to others": ".2f",
    "off_palette": ".1f",
    "residual": ".3f",
    "scene": ".3f",
    "pose": ".3f",
}


def measure_windows(reading: Reading, prompts: Sequence[Sequence[PanelPrompt]]) -> dict[str, Figure]:
    """The metrics of any story, and the distance from its first panel to its last four and to all others."""
    colours, _, _ = attributes(reading, prompts)
    from_first = np.nanmean(np.linalg.norm(colours[:, 1:] - colours[:, :1], axis=-1), axis=-1)
    across = across_stories(colours)
    return {
        **measure(reading, prompts),
        "first to last": over_stories(from_first[:, -4:].mean(1) / across),
        "first to others": over_stories(from_first.mean(1) / across),
    }
