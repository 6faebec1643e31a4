"""The paper's two measures of consistent panels, and the one that they leave out: whether poses still differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from .clip_scores import Scores, cosine

LEAST_JOINTS = 3
"""Two joints, moved and scaled, are only a direction; three are the fewest with a shape."""


@dataclass(frozen=True)
class Pose:
    """Keypoints (K, 2) of a figure, and which of them can be seen, (K,) of bool."""

    keypoints: Tensor
    visible: Tensor


def character_scores(images: Tensor, texts: Tensor | None, pose_distances: Sequence[float] = ()) -> Scores:
    """Measures of all panels of one character.

    - `text-image`: mean cosine of each panel and its prompt.
    - `character`: mean cosine of all pairs of panels. Panels that are copies of each other have 1, the best value.
    - `pose diversity`: mean `pose_distance` of all pairs of panels that have one. Copies have 0.

    Args:
        images: (N, E) embeddings, N at least 2.
        texts: (N, E) embeddings of the prompts, or None.
        pose_distances: of the pairs of panels whose poses could be compared.

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
    if pose_distances:
        scores["pose diversity"] = sum(pose_distances) / len(pose_distances)
    return scores


def pose_distance(a: Pose, b: Pose) -> float | None:
    """How much two poses differ, wherever and however large the figures are.

    Only joints that can be seen in both count: where a joint is hidden the reader guesses. Each figure's are moved to
    mean 0 and scaled to a root mean square of 1; the distance is the root mean square of the differences between
    corresponding joints: 0 for the same pose, at most 2.

    Args:
        a: one figure.
        b: the other, with the same keypoints.

    Returns:
        The distance, or None where fewer than `LEAST_JOINTS` joints can be seen in both, or all lie in one place.

    Raises:
        ValueError: other shapes.
    """
    shapes = [tuple(tensor.shape) for pose in (a, b) for tensor in (pose.keypoints, pose.visible)]
    if a.keypoints.ndim != 2 or shapes != 2 * [(len(a.keypoints), 2), (len(a.keypoints),)]:
        raise ValueError(f"Two poses must have the same keypoints (K, 2), (K,) visible; got {shapes}.")
    both = a.visible & b.visible
    first, second = (_centred(pose.keypoints[both]) for pose in (a, b))
    sizes = [figure.square().sum(dim=1).mean().sqrt() for figure in (first, second)]
    if both.sum() < LEAST_JOINTS or 0 in sizes:
        return None
    return float((first / sizes[0] - second / sizes[1]).square().sum(dim=1).mean().sqrt())


def _centred(keypoints: Tensor) -> Tensor:
    return keypoints.double() - keypoints.double().mean(dim=0)
