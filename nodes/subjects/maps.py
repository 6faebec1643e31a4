"""What a run knows of where characters stand: maps that model calls write, labels that they read. Host-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F

from ..story.model import Story
from .labels import label_tokens, may_read, spread_peaks

MAPS_KEY = "storydiffusion_subject_maps"
"""Entry of transformer_options during a run: its `SubjectMaps`."""


@dataclass(frozen=True)
class NamingTokens:
    """The tokens of one conditioning that tell of the story's characters."""

    length: int
    """Tokens of the conditioning; a call may hold it repeated."""
    positions: Sequence[Mapping[str, Sequence[int]]]
    """For each panel {character: positions}."""


@dataclass(frozen=True)
class TokenLabels:
    """Which character each token of each panel belongs to, at one layer's size."""

    labels: torch.Tensor
    """(B, N), see `labels.label_tokens`."""
    present: torch.Tensor
    """(B, C) bool: who stands in which panel."""

    def to(self, device: torch.device) -> TokenLabels:
        """The same on another device."""
        return TokenLabels(self.labels.to(device), self.present.to(device))

    def may_read(self, reader: int, source: int, tokens: torch.Tensor, *, subjects_only: bool) -> torch.Tensor:
        """(N, M): which of the `tokens` (M,) of panel `source` the tokens of panel `reader` may attend to."""
        given = self.labels[source][tokens.to(self.labels.device)]
        return may_read(self.labels[reader], given, self.present[reader], subjects_only=subjects_only)


@dataclass
class SubjectMaps:
    """Attention maps of one run, averaged over layers and past model calls; made when it starts, gone when it ends.

    A model call reads what earlier calls wrote, at other noise levels or up to `settle`, and never what its own step
    writes: the result doesn't depend on whether the host runs the halves of guidance, or windows, together or one by
    one. On several GPUs calls of one step run at once, in threads: each writes what is its conditioning's own, where it
    is, and what they wrote is added up in one order.
    """

    characters: tuple[str, ...]
    present: torch.Tensor
    """(B, C) bool: who stands in which panel."""
    size: tuple[int, int]
    """Height and width at which maps are kept."""
    given: Mapping[tuple[int, int], torch.Tensor]
    """Masks of the user's own (H, W), 0 to 1, by panel and character; they replace what attention says."""
    naming: Mapping[Any, NamingTokens]
    """By the host's uuid of a conditioning."""
    labelled: frozenset[int]
    """Panels whose tokens may pass by label only."""
    total: torch.Tensor | None = None
    """(B, C, *size): all that may be read, on no particular scale; None before the first call is over."""
    looked: bool = False
    """Whether the model has had its look before the first step."""
    _sigma: float | None = None
    _written: dict[Any, torch.Tensor] = field(default_factory=dict)
    """By the uuid of a conditioning: (B, C, *size), where its calls run."""
    _labels: dict[tuple[tuple[int, int], torch.device], TokenLabels] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def write(self, sigma: float, uuid: Any, panel: int, maps: Mapping[str, torch.Tensor]) -> None:
        """Add one layer's maps (h, w) of a panel's characters, as a call on the conditioning `uuid` sees them."""
        self._go_to(sigma)
        for name, attention in maps.items():
            if uuid not in self._written:
                self._written[uuid] = attention.new_zeros(*self.present.shape, *self.size)
            resized = F.interpolate(attention[None, None], self.size, mode="bilinear")[0, 0]
            self._written[uuid][panel, self.characters.index(name)] += resized

    def labels(self, sigma: float, size: tuple[int, int], device: torch.device) -> TokenLabels | None:
        """Labels of all panels' tokens at a layer's `size` (h, w), on the device of the call; None while `blind`."""
        self._go_to(sigma)
        if self.blind:
            return None
        with self._lock:
            if (size, device) not in self._labels:
                self._labels[size, device] = self._label(size).to(device)
            return self._labels[size, device]

    def _label(self, size: tuple[int, int]) -> TokenLabels:
        maps = torch.zeros(*self.present.shape, 1, 1) if self.total is None else self.total
        found = self.present.clone()
        for key in self.given:
            found[key] = False
        maps = F.interpolate(spread_peaks(maps), size, mode="bilinear").flatten(2)
        labels = label_tokens(maps, found.to(maps.device))
        for (panel, character), mask in self.given.items():
            # Half and above is inside: the ramp of a blurred edge is no region of its own.
            inside = F.interpolate(mask[None, None].float(), size, mode="area").flatten() >= 0.5
            labels[panel, inside.to(labels.device)] = character
        return TokenLabels(labels, self.present.to(labels.device))

    @property
    def blind(self) -> bool:
        """Whether it isn't known yet where the characters of the labelled panels stand."""
        return self.total is None and self.asked

    @property
    def asked(self) -> bool:
        """Whether the model has to be asked where somebody stands: not all of the labelled panels' masks are given."""
        wanted = [(panel, int(name)) for panel in self.labelled for name in self.present[panel].nonzero()]
        return not all(key in self.given for key in wanted)

    def settle(self) -> None:
        """Let all that was written be read from now on."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        for uuid in [uuid for uuid in self.naming if uuid in self._written]:
            written = self._written.pop(uuid)
            self.total = written if self.total is None else self.total + written.to(self.total.device)
            self._labels.clear()

    def _go_to(self, sigma: float) -> None:
        with self._lock:
            if sigma != self._sigma:
                self._settle()
            self._sigma = sigma


def new_maps(
    story: Story, labelled: frozenset[int], size: tuple[int, int], naming: Mapping[Any, NamingTokens]
) -> SubjectMaps:
    """Empty maps of a run.

    Raises:
        ValueError: if neither masks nor naming tokens tell where a character of a labelled panel stands.
    """
    characters = tuple(dict.fromkeys(name for panel in story.panels for name in panel.characters))
    given = {
        (index, characters.index(name)): mask
        for index, panel in enumerate(story.panels)
        for name, mask in panel.masks.items()
    }
    for index in sorted(labelled):
        for name in story.panels[index].characters:
            named = any(tokens.positions[index].get(name) for tokens in naming.values())
            if not named and (index, characters.index(name)) not in given:
                why = (
                    f"its prompt doesn't hold the words for [{name}] apart from others. Put spaces around the tag"
                    if naming
                    else f"the positive conditioning doesn't say which words mean [{name}]. Encode the story with "
                    "Encode Story Prompts"
                )
                raise ValueError(
                    f"Panel {index + 1}: where [{name}] stands can't be found, because {why}, or give masks with Set "
                    "Subject Masks."
                )
    present = torch.tensor([[name in panel.characters for name in characters] for panel in story.panels])
    return SubjectMaps(characters, present, size, given, naming, labelled)
