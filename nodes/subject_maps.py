"""Where the characters stand, read off the model's own cross-attention while it samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
import torch.nn.functional as F

from .frame_indices import frame_indices, frames_per_call
from .sampling_step import STEP_KEY
from .story_text import Story
from .subject_masks import label_tokens, may_read, spread_peaks
from .subject_tokens import SUBJECTS_KEY

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
    """(B, N), see `subject_masks.label_tokens`."""
    present: torch.Tensor
    """(B, C) bool: who stands in which panel."""

    def may_read(self, reader: int, source: int, tokens: torch.Tensor, *, subjects_only: bool) -> torch.Tensor:
        """(N, M): which of the `tokens` (M,) of panel `source` the tokens of panel `reader` may attend to."""
        given = self.labels[source][tokens.to(self.labels.device)]
        return may_read(self.labels[reader], given, self.present[reader], subjects_only=subjects_only)


@dataclass
class SubjectMaps:
    """Attention maps of one run, averaged over layers and past model calls; made when it starts, gone when it ends.

    A model call reads what earlier calls wrote, at other noise levels or up to `settle`, and never what its own step
    writes: the result doesn't depend on whether the host runs the halves of guidance, or windows, together or one by
    one.
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
    guarded: frozenset[int]
    """Panels whose tokens may pass by label only."""
    total: torch.Tensor | None = None
    """(B, C, *size): all that may be read, on no particular scale; None before the first call is over."""
    looked: bool = False
    """Whether the model has had its look before the first step."""
    _sigma: float | None = None
    _written: torch.Tensor | None = None
    _labels: dict[tuple[int, int], TokenLabels] = field(default_factory=dict)

    def write(self, sigma: float, panel: int, maps: Mapping[str, torch.Tensor]) -> None:
        """Add one layer's maps (h, w) of a panel's characters."""
        self._go_to(sigma)
        for name, attention in maps.items():
            if self._written is None:
                self._written = attention.new_zeros(*self.present.shape, *self.size)
            resized = F.interpolate(attention[None, None], self.size, mode="bilinear")[0, 0]
            self._written[panel, self.characters.index(name)] += resized

    def labels(self, sigma: float, size: tuple[int, int]) -> TokenLabels | None:
        """Labels of all panels' tokens at a layer's `size` (h, w); None while `blind`."""
        self._go_to(sigma)
        if self.blind:
            return None
        if size not in self._labels:
            self._labels[size] = self._label(size)
        return self._labels[size]

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
        """Whether it isn't known yet where the characters of the guarded panels stand."""
        asked = [(panel, int(name)) for panel in self.guarded for name in self.present[panel].nonzero()]
        return self.total is None and not all(key in self.given for key in asked)

    def settle(self) -> None:
        """Let all that was written be read from now on."""
        if self._written is not None:
            self.total = self._written if self.total is None else self.total + self._written
            self._written = None
            self._labels.clear()

    def _go_to(self, sigma: float) -> None:
        if sigma != self._sigma:
            self.settle()
        self._sigma = sigma


@dataclass(frozen=True)
class CrossAttentionReader:
    """`attn2_replace` patch that notes where the words of the characters are looked at, and changes nothing."""

    previous: Callable[..., torch.Tensor]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        """q: (chunks * panels, N, C), k and v: (chunks * panels, T, C), projected."""
        maps: SubjectMaps | None = extra_options.get(MAPS_KEY)
        if maps is not None:
            self._note(maps, q, k, extra_options)
        return self.previous(q, k, v, extra_options)

    def _note(self, maps: SubjectMaps, q: torch.Tensor, k: torch.Tensor, extra_options: dict[str, Any]) -> None:
        panels = frame_indices(frames_per_call(q.shape[0], extra_options), extra_options)
        size = extra_options["activations_shape"][-2:]
        sigma = extra_options[STEP_KEY].sigma
        for chunk, uuid in enumerate(extra_options["uuids"]):
            naming = maps.naming.get(uuid)
            if naming is None:  # the negative, or a prompt that names nobody
                continue
            for row, panel in enumerate(panels):
                positions = {name: found for name, found in naming.positions[panel].items() if found}
                if panel in maps.guarded and positions:
                    attention = token_attention(
                        q[chunk * len(panels) + row], k[chunk * len(panels) + row], extra_options["n_heads"]
                    )
                    attention = attention.unflatten(1, (-1, naming.length)).sum(1)  # repeats of one prompt
                    found = {name: attention[:, at].mean(1).unflatten(0, size) for name, at in positions.items()}
                    maps.write(sigma, panel, found)


def token_attention(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """Softmax attention (N, T) of queries (N, C) on keys (T, C), mean over heads, float32."""
    q, k = (tensor.float().unflatten(-1, (heads, -1)).transpose(0, 1) for tensor in (q, k))
    return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).mean(0)


def guarded_panels(story: Story, sources: Sequence[Sequence[int]], *, subjects_only: bool) -> frozenset[int]:
    """Panels whose tokens must be told apart: those that share with a second character in sight, or all that share."""
    guarded: set[int] = set()
    for reader, readable in enumerate(sources):
        casts = {name for panel in (reader, *readable) for name in story.panels[panel].characters}
        if readable and (subjects_only or len(casts) > 1):
            guarded |= {reader, *readable}
    return frozenset(guarded)


def require_reader(transformer_options: Mapping[str, Any]) -> None:
    """Refuse a model on which a later node has overwritten every `CrossAttentionReader`, as IP-Adapter nodes do."""
    patches = list(transformer_options.get("patches_replace", {}).get("attn2", {}).values())
    while patches:
        patch = patches.pop()
        if isinstance(patch, CrossAttentionReader):
            return
        patches += [patch.previous] if hasattr(patch, "previous") else []
    raise ValueError(
        "A node behind Apply Consistent Self-Attention has replaced the model's cross-attention, as IP-Adapter nodes "
        "do, so where the characters stand can't be seen. Connect that node before Apply Consistent Self-Attention."
    )


def require_whole_pictures(conds: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse prompts for an area: the host cuts it out, and what stands where in it can't be laid over whole panels."""
    for name, entries in conds.items():
        if any(entry.get("area") is not None or entry.get("set_area_to_bounds") for entry in entries):
            raise ValueError(
                f"The {name} conditioning has a prompt for an area. Where the characters of different panels meet, or "
                "share is subjects, panels must be drawn whole: use Conditioning (Set Mask) with set_cond_area "
                "'default' in the place of Conditioning (Set Area)."
            )


def follow_subjects(story: Story, guarded: frozenset[int]) -> Callable[..., Any]:
    """OUTER_SAMPLE wrapper that gives a run its own `SubjectMaps`."""

    def run(executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        require_reader(guider.model_options["transformer_options"])
        require_whole_pictures(guider.conds)
        naming = {
            entry["uuid"]: NamingTokens(entry["cross_attn"].shape[1], entry[SUBJECTS_KEY])
            for conditioning in guider.conds.values()
            for entry in conditioning
            if SUBJECTS_KEY in entry
        }
        # Half the latent's size is the finest at which SDXL attends.
        size = (-(-noise.shape[-2] // 2), -(-noise.shape[-1] // 2))
        # The guider's options are this run's own copy: the host makes it, and drops it at the end.
        guider.model_options["transformer_options"][MAPS_KEY] = new_maps(story, guarded, size, naming)
        return executor(noise, *args, **kwargs)

    return run


def look_first(
    executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """PREDICT_NOISE wrapper: before a run's first step let the model look once at what is there, without sharing.

    The first step decides much of a character's look; without this it would pass with nothing known of who stands
    where. One more model call a run, on the prompts that name characters alone.
    """
    maps: SubjectMaps | None = model_options["transformer_options"].get(MAPS_KEY)
    if maps is not None and maps.blind and not maps.looked:
        maps.looked = True  # where the prompts that name characters come in later only, there is nothing to be seen
        guider = executor.class_obj
        telling = [conds for conds in guider.conds.values() if any(entry["uuid"] in maps.naming for entry in conds)]
        comfy.samplers.calc_cond_batch(guider.inner_model, telling, x, timestep, model_options)
        maps.settle()
    return executor(x, timestep, model_options, *args, **kwargs)


def new_maps(
    story: Story, guarded: frozenset[int], size: tuple[int, int], naming: Mapping[Any, NamingTokens]
) -> SubjectMaps:
    """Empty maps of a run.

    Raises:
        ValueError: if neither masks nor naming tokens tell where a character of a guarded panel stands.
    """
    characters = tuple(dict.fromkeys(name for panel in story.panels for name in panel.characters))
    given = {
        (index, characters.index(name)): mask
        for index, panel in enumerate(story.panels)
        for name, mask in panel.masks.items()
    }
    for index in sorted(guarded):
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
    return SubjectMaps(characters, present, size, given, naming, guarded)
