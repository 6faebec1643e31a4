"""Sizes and frame counts that first-last-frame video models accept. Host-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class VideoFormat:
    """What a video model's VAE and patches can divide.

    Attributes:
        size_step: width and height are multiples of it, in pixels.
        frame_step: frame counts are a multiple of it, plus the first frame.
    """

    size_step: int
    frame_step: int

    def legal_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the nearest legal width and height, in pixels."""
        return self._nearest(width), self._nearest(height)

    def legal_frames(self, frames: int) -> int:
        """Return the smallest legal frame count that is at least `frames` and has both ends."""
        steps = -(-(frames - 1) // self.frame_step)
        return max(steps, 1) * self.frame_step + 1

    def legal_clip(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """Legal width, height and frame count of a clip."""
        return *self.legal_size(width, height), self.legal_frames(frames)

    def _nearest(self, pixels: int) -> int:
        return max((pixels + self.size_step // 2) // self.size_step, 1) * self.size_step


VIDEO_FORMATS: Mapping[str, VideoFormat] = {
    "Wan (16k, 4n+1)": VideoFormat(size_step=16, frame_step=4),
    "LTX (32k, 8n+1)": VideoFormat(size_step=32, frame_step=8),
}
