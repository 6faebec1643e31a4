"""Which panels a panel reads from. Host-free."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..story.model import Story


def all_other_panels(panels: int) -> list[list[int]]:
    """For each panel the panels it reads from: all the others, as in equation 2."""
    return [[source for source in range(panels) if source != reader] for reader in range(panels)]


def panels_sharing_a_character(
    characters: Sequence[Sequence[str]], references: Collection[int] = ()
) -> list[list[int]]:
    """For each panel the other panels that have at least one character in common with it.

    A panel without characters reads from none, and none reads from it. `references` names panels that are only read:
    given pictures, whose tokens must not change with the story drawn after them.
    """
    casts = [frozenset(names) for names in characters]
    return [
        [source for source, other in enumerate(casts) if source != reader and other & cast and reader not in references]
        for reader, cast in enumerate(casts)
    ]


def sources_within(panels: Sequence[int], sources: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """`sources` of a story restricted to a window of it: positions within `panels`, the window's panels in row order.

    With `sources` None every panel reads from all the others.
    """
    if sources is None:
        return all_other_panels(len(panels))
    position = {panel: row for row, panel in enumerate(panels)}
    return [[position[source] for source in sources[panel] if source in position] for panel in panels]


def story_sources(story: Story) -> list[list[int]]:
    """For each panel of `story` the panels it reads from."""
    references = [index for index, panel in enumerate(story.panels) if panel.is_reference]
    return panels_sharing_a_character([panel.characters for panel in story.panels], references)
