"""Read a video that a workflow saved."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def read_video(path: Path) -> tuple[NDArray[np.uint8], float]:
    """All frames, (F, H, W, 3), and how many there are in a second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return np.stack(frames), float(stream.average_rate)
