"""Subject masks: does the model's own cross-attention know who is where?

The meetings, drawn without sharing. Every step's labels are compared with who stands where in the finished picture:
the share of the figures' tokens that get the right character ("right") or the other one ("other's"), and of the
background's that get either. Only pictures that show both figures count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import comfy.patcher_extension
import comfy.sample
import numpy as np
import torch
import torch.nn.functional as F

from ...devtools.toy.figure import POSES, Kind, Part, draw_figure
from ...devtools.toy.oracle import Reading, read_pictures
from ...devtools.toy.world import POSE_NAMES, POSITION_NAMES, POSITIONS
from ...nodes.consistent_attention.blocks import decoder_blocks
from ...nodes.host.noise_level import StepNote
from ...nodes.host.unet import blocks_with_attention
from ...nodes.prompts.nodes import StoryEncodePrompts
from ...nodes.prompts.subject_tokens import SUBJECTS_KEY, phrase_positions
from ...nodes.story.model import Story
from ...nodes.subjects.labels import BACKGROUND, label_tokens, spread_peaks
from ...nodes.subjects.maps import MAPS_KEY, SubjectMaps
from ...nodes.subjects.run import watch_subjects
from .meetings import Meeting
from .metrics import Figure, Floats, over_stories
from .sampling import Painter

SIZES = (16, 8)
"""Heights and widths, in tokens, of the decoder's levels."""
COLUMNS = {f"{what}, {size} x {size}": ".2f" for size in SIZES for what in ("right", "other's", "background")}
ROWS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "the phrase": ("phrase", lambda maps: maps),
    "the phrase, and what lies around": ("phrase", spread_peaks),
    "the phrase and the token behind": ("both", lambda maps: maps),
    "the phrase and the token behind, and what lies around": ("both", spread_peaks),
}
"""Ways to find masks: the words whose attention is read, and what is done with it. The last is the nodes'."""


def measure_masks(painter: Painter, stories: Sequence[Meeting]) -> dict[str, dict[str, Figure]]:
    """Draw every story and measure each way of `ROWS`."""
    shares: dict[str, list[Floats]] = {name: [] for name in ROWS}
    for seed, told in enumerate(stories):
        steps, reading = _watch(painter, told.story, seed)
        for name, (words, treat) in ROWS.items():
            shares[name].append(np.concatenate([mask_shares(steps[words], treat, reading, size) for size in SIZES]))
    return {
        name: {column: over_stories(np.array(rows)[:, index]) for index, column in enumerate(COLUMNS)}
        for name, rows in shares.items()
    }


def _watch(painter: Painter, story: Story, seed: int) -> tuple[dict[str, list[torch.Tensor]], Reading]:
    """Maps (P, 2, H, W) of the man and the woman that each step would go by, by the words they are of; the pictures."""
    positive, negative = StoryEncodePrompts.execute(painter.clip, story).result
    both = positive[0][1][SUBJECTS_KEY]
    alone = [phrase_positions(painter.clip.tokenize, panel.prompt, panel.subjects) for panel in story.panels]
    # The phrases alone stand for two characters more, so that one drawing shows both ways.
    told = [
        {**own, **{f"{name}'s phrase": at for name, at in few.items()}} for own, few in zip(both, alone, strict=True)
    ]
    positive = [[tensor, {**options, SUBJECTS_KEY: told}] for tensor, options in positive]
    doubled = replace(
        story,
        panels=tuple(replace(panel, characters=tuple(own)) for panel, own in zip(story.panels, told, strict=True)),
    )
    steps: dict[str, list[torch.Tensor]] = {"both": [], "phrase": []}
    model = painter.model.clone()
    blocks = decoder_blocks(blocks_with_attention(model.model.diffusion_model))
    watch_subjects(model, blocks, doubled, frozenset(range(len(story.panels))))

    def note(executor: Any, x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any], *rest: Any) -> Any:
        maps: SubjectMaps = options["transformer_options"][MAPS_KEY]
        maps.settle()
        if maps.total is not None:
            for words, names in (("both", ("Bob", "Ann")), ("phrase", ("Bob's phrase", "Ann's phrase"))):
                steps[words].append(maps.total[:, [maps.characters.index(name) for name in names]].clone())
        return executor(x, sigma, options, *rest)

    wrappers = comfy.patcher_extension.WrappersMP
    model.add_wrapper_with_key(wrappers.APPLY_MODEL, "step", StepNote())
    model.add_wrapper_with_key(wrappers.PREDICT_NOISE, "labels", note)
    noise = comfy.sample.prepare_noise(torch.zeros(len(story.panels), 4, 32, 32), seed)
    images = painter.sample(model, noise, positive, negative, seed)
    return steps, read_pictures(images)


def mask_shares(
    steps: Sequence[torch.Tensor], treat: Callable[[torch.Tensor], torch.Tensor], reading: Reading, size: int
) -> Floats:
    """Right, other's and background of the meetings' panels at a level, mean over steps; NaN without a picture."""
    truth = figures(reading, size)
    met = [index for index, own in enumerate(truth) if {0, 1} <= set(own)]
    if not met:
        return np.full(3, np.nan)
    found = []
    for maps in steps:
        resized = F.interpolate(treat(maps[met]), (size, size), mode="bilinear").flatten(2)
        found.append(label_tokens(resized, torch.ones(len(met), 2, dtype=torch.bool)).numpy())
    labels, true = np.stack(found), truth[met]
    figure = np.broadcast_to(true != BACKGROUND, labels.shape)
    right, taken = labels == true, labels != BACKGROUND
    return np.array([right[figure].mean(), (taken & ~right)[figure].mean(), taken[~figure].mean()])


def figures(reading: Reading, size: int) -> np.ndarray:
    """Whose each token of n pictures is, [n, size * size]: 0 the man's, 1 the woman's, or BACKGROUND."""
    truth = np.full((len(reading.scene), size, size), BACKGROUND)
    for picture, owner, parts in _silhouettes(reading):
        scale = len(parts) // size
        inside = (parts != Part.BACKGROUND).reshape(size, scale, size, scale).mean((1, 3)) >= 0.5
        truth[picture][inside] = owner
    return truth.reshape(len(truth), -1)


def _silhouettes(reading: Reading) -> Iterator[tuple[int, int, np.ndarray]]:
    """Picture, kind and parts of every figure that was read."""
    for picture, count in enumerate(reading.figures):
        for figure in range(count):
            kind, hat = Kind(int(reading.kind[picture, figure])), bool(reading.hat[picture, figure])
            pose = POSES[POSE_NAMES[reading.pose[picture, figure]]]
            x = POSITIONS[POSITION_NAMES[reading.position[picture, figure]]]
            yield picture, int(kind), draw_figure(kind, pose, hat=hat, x=x)
