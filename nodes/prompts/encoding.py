"""A story's prompts through the text encoder of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..host.types import Conditioning
from ..story.model import Story
from .batching import repeat_rows, stack_conditioning
from .subject_tokens import SUBJECTS_KEY, subject_positions

if TYPE_CHECKING:
    from comfy.sd import CLIP


def encode_story(clip: CLIP | None, story: Story) -> tuple[Conditioning, Conditioning]:
    """The positive and the negative conditioning of a story, each with a row per panel.

    The positive one also tells, under `SUBJECTS_KEY`, which tokens of each row mean which character.

    Raises:
        ValueError: no text encoder.
    """
    if clip is None:
        raise ValueError("clip is None: this checkpoint holds no text encoder. Load one with Load CLIP.")

    def encode(prompt: str) -> Conditioning:
        conditioning: Conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        return conditioning

    positive = stack_conditioning([encode(panel.prompt) for panel in story.panels])
    subjects = [subject_positions(clip.tokenize, panel.prompt, panel.subjects) for panel in story.panels]
    for _, options in positive:
        options[SUBJECTS_KEY] = subjects
    return positive, repeat_rows(encode(story.negative), len(story.panels))
