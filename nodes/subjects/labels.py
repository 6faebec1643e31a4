"""Where the characters of a panel stand, and which tokens may therefore pass between panels. Host-free.

As in ConsiStory (arXiv 2402.03286): a character is where the model's cross-attention looks at the words that name it,
cut off by Otsu's threshold. The model looks at words from a few places of a figure only, so each counts for what lies
around it, as in Prompt-to-Prompt (arXiv 2208.01626). A token is labelled with one character, an index into the story's
characters, or with BACKGROUND.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BACKGROUND = -1
_NEIGHBOURHOOD = 16
"""Prompt-to-Prompt's neighbourhood: one token to each side, on maps of 16 x 16."""


def otsu_threshold(values: torch.Tensor) -> torch.Tensor:
    """Threshold (...) that cuts values (..., N) into the two classes that lie farthest apart (Otsu, 1979)."""
    ordered = values.sort(dim=-1).values
    count = ordered.shape[-1]
    below = torch.arange(1, count, device=values.device)
    sums = ordered.cumsum(-1)
    mean_below, mean_above = sums[..., :-1] / below, (sums[..., -1:] - sums[..., :-1]) / (count - below)
    between_classes = below * (count - below) * (mean_above - mean_below) ** 2
    cut = between_classes.argmax(-1, keepdim=True)
    return (ordered.gather(-1, cut) + ordered.gather(-1, cut + 1)).squeeze(-1) / 2


def spread_peaks(maps: torch.Tensor) -> torch.Tensor:
    """Maps (B, C, H, W) with each value the largest within a sixteenth of the picture to every side."""
    radius = round(min(maps.shape[-2:]) / _NEIGHBOURHOOD)
    return F.max_pool2d(maps, 2 * radius + 1, stride=1, padding=radius)


def label_tokens(maps: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Label every token of B panels.

    Args:
        maps: (B, C, N) how much each token belongs to each of the story's C characters, on any scale.
        present: (B, C) whether the character stands in the panel at all.

    Returns:
        (B, N) int64, the character or BACKGROUND
    """
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    # Words differ in how much attention they draw; each map is brought to 0..1 before characters compete.
    score = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    score = score * (score > otsu_threshold(score)[..., None]) * present[..., None]
    best, label = score.max(dim=1)
    return torch.where(best > 0, label, BACKGROUND)


def may_read(
    query_labels: torch.Tensor, key_labels: torch.Tensor, present: torch.Tensor, *, subjects_only: bool
) -> torch.Tensor:
    """Which keys of another panel a panel's queries may attend to, (N, M) bool.

    A character's tokens go to that character's tokens, never to another's, and to the background of panels in which
    it stands; background goes everywhere. With `subjects_only` background neither gives nor receives.

    Args:
        query_labels: (N,) labels of the reading panel's tokens.
        key_labels: (M,) labels of the tokens it is given.
        present: (C,) the characters that stand in the reading panel.
    """
    query, key = query_labels[:, None], key_labels[None]
    same = (query == key) & (key != BACKGROUND)
    if subjects_only:
        return same
    known = present[key_labels.clamp(min=0)][None]
    return same | (key == BACKGROUND) | ((query == BACKGROUND) & known)
