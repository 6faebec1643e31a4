"""Stage (a): the predictor against encoded true frames, in token space (equation 7)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...checkpoint import save_checkpoint
from ...injection import AddedKV
from ...interpolation import interpolate_linear
from ...model import SemanticMotion
from ...predictor import SemanticMotionPredictor
from ..data.clips import Clip
from .path_picture import draw_paths
from .stage import Preview, Stage, draw_nothing, per_clip_mse

SMP_FILE = "smp.safetensors"


class SemanticStage(Stage):
    """Mean squared error between predicted and true tokens of every frame, the two given ones included.

    The encoder is not here at all: its tokens are precomputed. Resampler, projection and added projections stay as
    they are, so the trained file decodes through what `start` brought.

    Args:
        motion: an SMP with a predictor.
        added_kv: its added projections.

    Raises:
        ValueError: no predictor.
    """

    fields = ("tokens",)

    def __init__(self, motion: SemanticMotion, added_kv: AddedKV) -> None:
        """Freezes all but the predictor."""
        super().__init__()
        self.draw = draw_nothing
        self.motion, self.added_kv = motion, added_kv
        self.requires_grad_(False)
        require_predictor(motion).requires_grad_(True)

    def forward(self, batch: Clip) -> Tensor:
        """Equation 7 for each clip, (B,)."""
        return per_clip_mse(self.predict(batch["tokens"]), batch["tokens"])

    def predict(self, tokens: Tensor) -> Tensor:
        """P from the first and the last true frame: (B, F, N, C) -> (B, F, N, C)."""
        return require_predictor(self.motion)(tokens[:, 0], tokens[:, -1], tokens.shape[1])

    def validate(self, batch: Clip) -> dict[str, Tensor]:
        """The loss, beside that of the straight line, which an untrained residual predictor has."""
        tokens = batch["tokens"]
        line = interpolate_linear(tokens[:, 0], tokens[:, -1], tokens.shape[1])
        return {"loss": self(batch), "linear": per_clip_mse(line, tokens)}

    def preview(self, clip: Clip) -> Preview:
        """The clip's way through token space: true, predicted, straight."""
        tokens = clip["tokens"][None]
        line = interpolate_linear(tokens[:, 0], tokens[:, -1], tokens.shape[1])
        paths = {"true": tokens, "linear": line, "predicted": self.predict(tokens)}
        return {"path": [draw_paths({name: path[0].flatten(1).float().cpu() for name, path in paths.items()})]}

    def export(self, folder: Path) -> None:
        """Write `smp.safetensors`."""
        save_checkpoint(folder / SMP_FILE, self.motion, self.added_kv)


def require_predictor(motion: SemanticMotion) -> SemanticMotionPredictor:
    """The SMP's predictor; ValueError when it has none."""
    if motion.predictor is None:
        raise ValueError("This SMP interpolates: it has no predictor to train.")
    return motion.predictor
