"""A story's prompts through the text encoder of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..host.padded_text import leave_out_padding
from ..host.types import LENGTHS_KEY, Conditioning
from ..story.markup import embedding_names
from ..story.model import Story
from ..story.place import name_some
from .batching import repeat_rows, stack_conditioning
from .subject_tokens import SUBJECTS_KEY, subject_positions

if TYPE_CHECKING:
    from comfy.sd import CLIP


def with_words_around(story: Story, prefix: str, suffix: str) -> Story:
    """`story` with the same words before and behind every panel's prompt, set off by commas."""

    def joined(prompt: str) -> str:
        parts = (" ".join(part.split()).strip(" ,") for part in (prefix, prompt, suffix))
        return ", ".join(part for part in parts if part)

    if not prefix.strip() and not suffix.strip():
        return story
    return replace(story, panels=tuple(replace(panel, prompt=joined(panel.prompt)) for panel in story.panels))


def missing_embeddings(clip: CLIP, story: Story) -> str:
    """What to tell of embeddings that the prompts ask for and the host doesn't find; empty if there are none."""
    asked: dict[str, list[str]] = {}
    prompts = [(f"panel {number}", panel.prompt) for number, panel in enumerate(story.panels, 1)]
    for place, prompt in [*prompts, ("the negative prompt", story.negative)]:
        for name in dict.fromkeys(embedding_names(prompt)):
            asked.setdefault(name, []).append(place)
    return "\n".join(
        f"embedding:{name} ({name_some(places)}) is no file in models/embeddings that fits this model, and is left out."
        for name, places in asked.items()
        if not _finds(clip, name)
    )


def _finds(clip: CLIP, name: str) -> bool:
    """Whether the host has vectors for an embedding's name."""
    encoders = clip.tokenize(f"embedding:{name}").values()
    return any(isinstance(pair[0], Tensor) for chunks in encoders for chunk in chunks for pair in chunk)


def encode_story(clip: CLIP, story: Story) -> tuple[Conditioning, Conditioning]:
    """The positive and the negative conditioning of a story, each with a row per panel.

    The positive one also tells, under `SUBJECTS_KEY`, which tokens of each row mean which character.
    """

    def encode(prompt: str) -> Conditioning:
        conditioning: Conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        return conditioning

    positive = stack_conditioning([encode(panel.prompt) for panel in story.panels])
    subjects = [subject_positions(clip.tokenize, panel.prompt, panel.subjects) for panel in story.panels]
    for _, options in positive:
        options[SUBJECTS_KEY] = subjects
    negative = repeat_rows(encode(story.negative), len(story.panels))
    if any(LENGTHS_KEY in options for _, options in positive):
        leave_out_padding(positive, negative)
    return positive, negative
