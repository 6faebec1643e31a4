"""Given pictures as panels in front of a story, for its panels to be drawn after. Host-free."""

from __future__ import annotations

from dataclasses import replace

from ..story.model import UNNAMED_CHARACTER, Panel, Story
from ..story.parser import parse_story
from ..story.place import quote
from ..story.tags import as_tags

DEFAULT_WEIGHT = 2.0
LEAST_WEIGHT, GREATEST_WEIGHT = 0.1, 16.0


def read_references(text: str, characters: str, pictures: int, weight: float) -> Story:
    """The lines that describe `pictures` given pictures, as panels marked as such, of that weight.

    Raises:
        ValueError: a weight out of range, no line, another number of lines than pictures, a line that can't be read.
    """
    if not LEAST_WEIGHT <= weight <= GREATEST_WEIGHT:
        raise ValueError(f"weight is {weight}; it must lie between {LEAST_WEIGHT} and {GREATEST_WEIGHT}.")
    if not text.strip():
        raise ValueError(
            "references is empty. Write one line for each picture, as in '[Bob] stands in front of a white wall'."
        )
    described = parse_story(text, characters, split_by="line", field="References")
    if len(described.panels) != pictures:
        raise ValueError(
            f"references describes {len(described.panels)} pictures, but images holds {pictures}. Write one line for "
            f"each picture."
        )
    marked = (replace(panel, is_reference=True, weight=weight) for panel in described.panels)
    return replace(described, panels=tuple(marked))


def add_reference_panels(story: Story, references: Story) -> Story:
    """`story` with the panels of `references`, from `read_references`, in front.

    Their characters get the names that the story gives them: panels share by name.

    Raises:
        ValueError: if no panel of the story has a character of some picture, so that none would look at it.
    """
    drawn = {name for panel in story.panels if not panel.is_reference for name in panel.characters}
    given = [_renamed(panel, story) for panel in references.panels]
    for number, panel in enumerate(given, 1):
        if drawn.isdisjoint(panel.characters):
            raise ValueError(_unseen(number, panel, [name for name in story.characters if name in drawn]))
    return replace(story, panels=(*given, *story.panels))


def _renamed(panel: Panel, story: Story) -> Panel:
    """`panel` with the story's own spelling of its characters."""
    names = {name: story.own_name(name) or name for name in panel.characters}
    subjects = {names[name]: phrase for name, phrase in panel.subjects.items()}
    return replace(panel, characters=tuple(names.values()), subjects=subjects)


def _unseen(number: int, panel: Panel, drawn: list[str]) -> str:
    """What is wrong with picture `number`, which shows none of the characters `drawn`."""
    named = [name for name in panel.characters if name != UNNAMED_CHARACTER]
    if not drawn:
        remedy = "No panel of the story has a character."
    elif UNNAMED_CHARACTER in drawn:
        remedy = "The story names no character: write the lines of references without tags, and leave characters empty."
    else:
        remedy = f"The story's characters are {as_tags(drawn)}: write the tag of one of them in the picture's line."
    return (
        f"No panel of the story would look at picture {number}: its line of references ({quote(panel.caption)}) names "
        f"{as_tags(named) or 'no character'}. {remedy}"
    )
