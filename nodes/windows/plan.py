"""Windows over the panels of a long story, so that its cost in memory is that of one window. Host-free.

The paper slides a window over the story, and says itself that windows exchange nothing globally. Here every window
also holds the anchors of its panels: for each character that stands in the window, the panel in which it first
appears. All windows of a sampling step see the anchors at the same noise level, so a character's first panel is what
all its later panels are drawn after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..story.model import UNNAMED_CHARACTER


@dataclass(frozen=True)
class PanelWindow:
    """Panels that the model sees together, ascending, and those of them whose result this window gives."""

    panels: tuple[int, ...]
    owned: tuple[int, ...]


def plan_windows(casts: Sequence[Sequence[str]], window: int) -> list[PanelWindow]:
    """Cut a story into windows of at most `window` panels; `casts` names the characters of each panel.

    Where nobody has a name, one character without any, "" or `UNNAMED_CHARACTER`, stands for all.

    Every panel is owned by exactly one window; an anchor that a window only reads is computed again there. With A
    anchors per window that is at most window / (window - A) times the work of one batch.

    Raises:
        ValueError: if a panel and the anchors of its characters don't fit one window.
    """
    anchors: dict[str, int] = {}
    for panel, cast in enumerate(casts):
        for character in cast:
            anchors.setdefault(character, panel)

    windows: list[PanelWindow] = []
    members: set[int] = set()
    owned: list[int] = []
    for panel, cast in enumerate(casts):
        needed = {panel, *(anchors[character] for character in cast)}
        if len(needed) > window:
            raise ValueError(
                f"window is {window}, but panel {panel + 1} needs {len(needed)} panels at once: itself and "
                f"{_anchors_in_words(cast)}. Set window to {len(needed)} or more."
            )
        if len(members | needed) > window:
            windows.append(PanelWindow(tuple(sorted(members)), tuple(owned)))
            members, owned = set(), []
        members |= needed
        owned.append(panel)
    return [*windows, PanelWindow(tuple(sorted(members)), tuple(owned))] if owned else windows


def _anchors_in_words(cast: Sequence[str]) -> str:
    names = [name for name in cast if name not in ("", UNNAMED_CHARACTER)]
    if not names:
        return "the one that it is drawn after"
    return f"the panels in which its characters ({', '.join(names)}) first appear"
