"""The motion without a trained predictor: tokens interpolated between two panels, never re-normalised."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_SINE = 1e-4  # next to angle 0 the circle is a straight line; next to pi it is no particular one


def frame_times(frames: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Times of `frames` frames from 0 (start) to 1 (end), both included: (F,).

    Raises:
        ValueError: fewer than two frames; a transition has a first and a last one.
    """
    if frames < 2:
        raise ValueError(f"frames is {frames}; a transition needs at least 2, its first and its last.")
    return torch.linspace(0, 1, frames, device=device, dtype=dtype)


def interpolate_linear(start: Tensor, end: Tensor, frames: int) -> Tensor:
    """Straight line between the tokens (paper, before equation 5): (B, N, C) twice -> (B, F, N, C).

    Frame 0 is `start` and frame F-1 is `end`, bit for bit.
    """
    require_same_shape(start, end)
    times = frame_times(frames, device=start.device, dtype=start.dtype)
    return torch.lerp(start[:, None], end[:, None], times[:, None, None])


def interpolate_spherical(start: Tensor, end: Tensor, frames: int) -> Tensor:
    """Great circle between each token's directions, length linear: (B, N, C) twice -> (B, F, N, C).

    Frame 0 is `start` and frame F-1 is `end`, bit for bit. Where a direction is undefined (a zero token, or
    two tokens pointing in the same or in exactly opposite ways) the token moves on the straight line instead.
    """
    straight = interpolate_linear(start, end, frames)
    a, b = start[:, None].float(), end[:, None].float()
    times = frame_times(frames, device=start.device)[:, None, None]
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    direction_a, direction_b = a / length_a, b / length_b  # a zero token gives NaN here, replaced below
    # Kahan's angle: the arc cosine of a dot product has lost half its digits near 0 and near pi.
    difference, total = direction_a - direction_b, direction_a + direction_b
    angle = 2 * torch.atan2(difference.norm(dim=-1, keepdim=True), total.norm(dim=-1, keepdim=True))
    sine = angle.sin()
    direction = (torch.sin((1 - times) * angle) * direction_a + torch.sin(times * angle) * direction_b) / sine
    curved = direction * torch.lerp(length_a, length_b, times)
    inner = torch.where(sine > _SMALLEST_SINE, curved, straight.float()).to(start.dtype)
    return torch.cat([start[:, None], inner[:, 1:-1], end[:, None]], dim=1)


def require_same_shape(start: Tensor, end: Tensor) -> None:
    """ValueError unless both are (B, N, C) of one shape."""
    if start.ndim != 3 or start.shape != end.shape:
        raise ValueError(
            f"start and end must both be (batch, tokens, width) of one shape; "
            f"got {tuple(start.shape)} and {tuple(end.shape)}."
        )
