"""What a story is once it has been read: panels with prompts, captions and casts. Host-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .tags import name_key

if TYPE_CHECKING:
    import torch

UNNAMED_CHARACTER = "(unnamed)"
"""The one character of a story that tags nobody, so that its panels have a character in common."""

CONNECT_PANEL_COUNT = "Connect panel_count of Story Prompt Splitter to batch_size of the empty latent."
"""What to do where a latent batch has another number of rows than the story has panels; several nodes say it."""


@dataclass(frozen=True)
class Panel:
    """One picture of a story.

    `prompt` is complete (characters described, style applied). `characters` names those who stand in the
    panel: none for `[NC]`; in a story that names nobody, every other panel has `UNNAMED_CHARACTER`.
    `is_reference` marks a given picture that the story's panels are drawn after, not one that is drawn.
    `subjects` gives, for each of `characters`, the words that stand for it in the prompt, its description or its
    name, in the order in which they stand there. `masks` gives where it stands, (H, W) from 0 to 1, if the user has
    said so. `weight` is that of the panel's tokens in the softmax of others, whose own weigh 1.
    """

    prompt: str
    caption: str
    characters: tuple[str, ...]
    is_reference: bool = False
    subjects: dict[str, str] = field(default_factory=dict, compare=False)
    masks: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)
    weight: float = 1.0


@dataclass(frozen=True)
class Story:
    """Panels in reading order, and the one negative prompt they share."""

    panels: tuple[Panel, ...]
    negative: str
    notices: tuple[str, ...] = field(default=(), compare=False)
    """What the reader of its text should look at, though nothing is wrong for sure."""

    @property
    def characters(self) -> tuple[str, ...]:
        """All who stand in its panels, in the order in which they appear."""
        return tuple(dict.fromkeys(name for panel in self.panels for name in panel.characters))

    def own_name(self, name: str) -> str | None:
        """The story's own spelling of `name`, None if it has no such character.

        Text of another field has tags of its own, "[bob]" where the story says "[Bob]": these are one character.
        """
        return next((own for own in self.characters if name_key(own) == name_key(name)), None)
