"""The paper's two measures of consistent panels, and the one that they leave out: whether poses still differ."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from .clip_scores import Scores, cosine


def character_scores(images: Tensor, texts: Tensor | None, poses: Sequence[Tensor] = ()) -> Scores:
    """Measures of all panels of one character.

    - `text-image`: mean cosine of each panel and its prompt.
    - `character`: mean cosine of all pairs of panels. Panels that are copies of each other have 1, the best value.
    - `pose diversity`: mean `pose_distance` of all pairs of panels in which a person was found. Copies have 0.

    Args:
        images: (N, E) embeddings, N at least 2.
        texts: (N, E) embeddings of the prompts, or None.
        poses: keypoints (K, 2) of the panels in which a person was found.

    Raises:
        ValueError: fewer than two panels, or another number of texts.
    """
    if len(images) < 2:
        raise ValueError(f"A character needs at least 2 panels to be compared; it has {len(images)}.")
    if texts is not None and texts.shape != images.shape:
        raise ValueError(f"There are embeddings {tuple(images.shape)} of panels and {tuple(texts.shape)} of texts.")
    first, second = zip(*combinations(range(len(images)), 2), strict=True)
    scores: Scores = {} if texts is None else {"text-image": float(cosine(images, texts).mean())}
    scores["character"] = float(cosine(images[list(first)], images[list(second)]).mean())
    if len(poses) > 1:
        distances = [pose_distance(a, b) for a, b in combinations(poses, 2)]
        scores["pose diversity"] = sum(distances) / len(distances)
    return scores


def pose_distance(a: Tensor, b: Tensor) -> float:
    """How much two poses differ, wherever and however large the figures are.

    Each figure's keypoints are moved to mean 0 and scaled to a root mean square of 1; the distance is the root mean
    square of the differences between corresponding keypoints: 0 for the same pose, at most 2.

    Args:
        a: (K, 2) keypoints.
        b: (K, 2), the same ones of the other figure.

    Raises:
        ValueError: other shapes, or a figure whose keypoints all lie in one place.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"Two poses must have the same keypoints (K, 2); got {tuple(a.shape)} and {tuple(b.shape)}.")
    return float((_normalised(a) - _normalised(b)).square().sum(dim=1).mean().sqrt())


def _normalised(keypoints: Tensor) -> Tensor:
    centred = keypoints.double() - keypoints.double().mean(dim=0)
    size = centred.square().sum(dim=1).mean().sqrt()
    if size == 0:
        raise ValueError("All keypoints of a pose lie in one place.")
    return centred / size
