"""One run's subject maps: which panels need them, when they are made, and the look before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..host.patches import replace_attention
from ..host.unet import Place, UNetBlock
from ..prompts.subject_tokens import SUBJECTS_KEY
from ..story.model import Story
from .maps import MAPS_KEY, NamingTokens, SubjectMaps, new_maps
from .reader import CrossAttentionReader, require_readers

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

WRAPPER_KEY = "storydiffusion_subjects"


def labelled_panels(story: Story, sources: Sequence[Sequence[int]], *, subjects_only: bool) -> frozenset[int]:
    """Panels whose tokens must be told apart: those that share with a second character in sight, or all that share."""
    labelled: set[int] = set()
    for reader, readable in enumerate(sources):
        casts = {name for panel in (reader, *readable) for name in story.panels[panel].characters}
        if readable and (subjects_only or len(casts) > 1):
            labelled |= {reader, *readable}
    return frozenset(labelled)


def require_whole_pictures(conds: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse prompts for an area: the host cuts it out, and what stands where in it can't be laid over whole panels."""
    for name, entries in conds.items():
        if any(entry.get("area") is not None or entry.get("set_area_to_bounds") for entry in entries):
            raise ValueError(
                f"The {name} conditioning has a prompt for an area. Where the characters of different panels meet, or "
                "share is subjects, panels must be drawn whole: use Conditioning (Set Mask) with set_cond_area "
                "'default' in the place of Conditioning (Set Area)."
            )


def follow_subjects(story: Story, labelled: frozenset[int], places: Sequence[Place]) -> Callable[..., Any]:
    """OUTER_SAMPLE wrapper that gives a run its own `SubjectMaps`, which the cross-attentions at `places` write."""

    def run(executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        require_readers(guider.model_options["transformer_options"], places)
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
        guider.model_options["transformer_options"][MAPS_KEY] = new_maps(story, labelled, size, naming)
        return executor(noise, *args, **kwargs)

    return run


def probe_subjects(
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


def watch_subjects(model: ModelPatcher, blocks: Sequence[UNetBlock], story: Story, labelled: frozenset[int]) -> None:
    """Let `model`, a clone, note where its `blocks` look at the words of the story's characters."""
    keys = [block.key for block in blocks]
    replace_attention(model, "attn2", keys, lambda _block, owner: CrossAttentionReader(previous=owner))
    places = [place for block in blocks for place in block.places]
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, follow_subjects(story, labelled, places))
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, WRAPPER_KEY, probe_subjects)
