"""What the inputs of Apply Consistent Self-Attention come to. Host-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SHARE_CHOICES = ["everything", "subjects"]
TOKEN_CHOICES = ["random", "grid"]


@dataclass(frozen=True)
class SharingSettings:
    """What every patched block shares; when, a step says itself (`SamplingStep.active`)."""

    sampling_rate: float
    seed: int
    sources: Sequence[Sequence[int]] | None
    """For each panel the panels it reads from; None: every panel reads from all the others."""
    strength: float = 1.0
    """Weight of other panels' keys in the softmax, relative to a panel's own."""
    weights: Sequence[float] | None = None
    """For each panel what multiplies `strength` for its keys; None: nothing does."""
    level_rates: Mapping[int, float] = field(default_factory=dict)
    """Sampling rates of single levels, by their downsampling factor."""
    token_choice: str = "random"
    """random or grid."""
    share: str = "everything"
    """everything, or subjects: then background is left out."""

    @property
    def subjects_only(self) -> bool:
        """Whether background is left out of sharing."""
        return self.share == "subjects"

    def weight_of(self, panel: int) -> float:
        """Weight of a panel's keys in the softmax of others."""
        return self.strength * (self.weights[panel] if self.weights else 1)

    @property
    def biased(self) -> bool:
        """Whether some keys weigh more or less than others, so that attention needs a bias."""
        if self.strength == 0:  # nothing is shared at all
            return False
        return self.strength != 1 or any(weight != 1 for weight in self.weights or ())

    @property
    def shares(self) -> bool:
        """Whether any token is shared."""
        return self.strength > 0 and max(self.sampling_rate, *self.level_rates.values(), 0) > 0

    def rate_at(self, downsampling: int) -> float:
        """Sampling rate of the blocks at a level."""
        return self.level_rates.get(downsampling, self.sampling_rate)

    def __post_init__(self) -> None:
        """ValueError for a value out of range."""
        if not 0 <= self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate}; it must lie between 0 and 1.")
        choices = (("share", self.share, SHARE_CHOICES), ("token_choice", self.token_choice, TOKEN_CHOICES))
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; it must lie between 0 and 1.")
