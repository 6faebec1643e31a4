"""Node: Apply Consistent Self-Attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.patcher_extension
from comfy_api.latest import io

from .attention_patch import (
    STEP_KEY,
    AttentionBlock,
    ConsistentSelfAttentionPatch,
    SharingSettings,
    note_step,
    plain_attention,
    require_matching_rows,
    self_attention_blocks,
)
from .panel_preview import PREVIEW_KEY, preview_all_panels
from .story_text import UNNAMED_CHARACTER, Story
from .story_type import StoryType
from .subject_maps import CrossAttentionReader, follow_subjects, guarded_panels
from .token_sharing import panels_sharing_a_character, sampled_token_count
from .window_handler import evaluate_in_windows

WRAPPER_KEY = "storydiffusion_consistent_self_attention"
BLOCK_CHOICES = ["decoder", "decoder_upper_levels", "all"]
SHARE_CHOICES = ["everything", "subjects"]
TOKEN_CHOICES = ["random", "grid"]


def decoder_blocks(blocks: Sequence[AttentionBlock]) -> list[AttentionBlock]:
    """The blocks after the middle one."""
    return [block for block in blocks if block.key[0] == "output"]


def choose_blocks(blocks: Sequence[AttentionBlock], choice: str) -> list[AttentionBlock]:
    """The blocks that `choice`, one of BLOCK_CHOICES, stands for."""
    if choice == "all":
        return list(blocks)
    decoder = decoder_blocks(blocks)
    if choice == "decoder":
        return decoder
    if choice == "decoder_upper_levels":
        lowest = max(block.downsampling for block in decoder)
        return [block for block in decoder if block.downsampling < lowest]
    raise ValueError(f"blocks is {choice!r}; it must be one of {', '.join(BLOCK_CHOICES)}.")


def require_unet(model: Any) -> Any:
    """The model's UNet, or an error that says what the model is instead."""
    unet = model.model.diffusion_model
    if not isinstance(unet, openaimodel.UNetModel):
        raise ValueError(
            f"Consistent Self-Attention works on UNet models (SD1.5, SDXL), but this model is a "
            f"{type(model.model).__name__} ({type(unet).__name__}). Load an SD1.5 or SDXL checkpoint."
        )
    return unet


def story_sources(story: Story) -> list[list[int]]:
    """For each panel of `story` the panels it reads from."""
    references = [index for index, panel in enumerate(story.panels) if panel.is_reference]
    return panels_sharing_a_character([panel.characters for panel in story.panels], references)


def parse_level_rates(text: str, blocks: Sequence[AttentionBlock]) -> dict[int, float]:
    """Read "2: 0.3, 4: 0.7" as {downsampling: sampling rate}; `blocks` are those that share."""
    levels = sorted({block.downsampling for block in blocks})
    rates: dict[int, float] = {}
    for part in filter(str.strip, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d*\.?\d+)\s*", part)
        if not match:
            raise ValueError(f"level_rates has {part.strip()!r}; write 'level: rate' pairs, as in '2: 0.3, 4: 0.7'.")
        level, rate = int(match[1]), float(match[2])
        if level not in levels:
            known = ", ".join(map(str, levels))
            raise ValueError(f"level_rates names level {level}, but the chosen blocks lie on the levels {known}.")
        if not 0 <= rate <= 1:
            raise ValueError(f"level_rates gives level {level} the rate {rate}; it must lie between 0 and 1.")
        rates[level] = rate
    return rates


def replace_attention(
    model: Any, kind: str, blocks: Sequence[AttentionBlock], make: Callable[[AttentionBlock, Any], Any]
) -> None:
    """Set `make(block, owner)` as the patch of kind "attn1" or "attn2" of each block of `model`, a clone.

    `owner` is the patch that another node has set there, None where there is none.
    """
    owned = model.model_options["transformer_options"].get("patches_replace", {}).get(kind, {})
    replace = model.set_model_attn1_replace if kind == "attn1" else model.set_model_attn2_replace
    for block in blocks:
        # An owner by (block, number, depth) would win over one by (block, number): wrap each where it is.
        owners = {owner: patch for owner, patch in owned.items() if owner[:2] == block.key}
        for owner, patch in {block.key: None, **owners}.items():
            replace(make(block, patch), *block.key, owner[2] if len(owner) == 3 else None)


def share_tokens(
    model: Any, settings: SharingSettings, blocks: Sequence[AttentionBlock], *, guarded: bool = False
) -> None:
    """Attach Consistent Self-Attention to `blocks` of `model`, a clone, around what owns them already.

    `guarded`: whether subject masks will be at work.
    """

    def patch(block: AttentionBlock, owner: Any) -> ConsistentSelfAttentionPatch:
        if isinstance(owner, ConsistentSelfAttentionPatch):
            raise ValueError(
                "This model has Consistent Self-Attention already. Remove one of the two Apply Consistent "
                "Self-Attention nodes, or connect this one to the model from before the other."
            )
        if getattr(owner, "__module__", None) == "comfy_extras.nodes_sag":
            raise ValueError(
                "Self-Attention Guidance comes before Apply Consistent Self-Attention on this model, and would take "
                "the keys that panels share for a panel's own. Connect it behind, or set blocks to decoder."
            )
        if owner is not None and (guarded or settings.strength not in (0, 1)):
            raise ValueError(
                f"Another node has replaced the self-attention of UNet block {block.key}, and a replacement can't be "
                f"told to weigh tokens. Remove that node, or set strength to 1, share to everything and have no panel "
                f"in which characters of different panels meet."
            )
        return ConsistentSelfAttentionPatch(settings, settings.rate_at(block.downsampling), *([owner] if owner else []))

    replace_attention(model, "attn1", blocks, patch)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, WRAPPER_KEY, note_step)


def panels_to_guard(story: Story | None, settings: SharingSettings) -> frozenset[int]:
    """Panels in which tokens have to be told apart by character."""
    if story is None or settings.sources is None:
        if settings.subjects_only:
            raise ValueError("share is 'subjects', which needs to know the characters: connect a story.")
        return frozenset()
    guarded = guarded_panels(story, settings.sources, subjects_only=settings.subjects_only)
    if settings.subjects_only and any(UNNAMED_CHARACTER in story.panels[panel].characters for panel in guarded):
        raise ValueError(
            "share is 'subjects', but the story names no character. Write [Name] in front of its first panel, and "
            "describe [Name] in the characters field."
        )
    return guarded


def watch_subjects(model: Any, blocks: Sequence[AttentionBlock], story: Story, guarded: frozenset[int]) -> None:
    """Let `model`, a clone, note where it looks at the words of the story's characters."""
    replace_attention(
        model, "attn2", blocks, lambda _block, owner: CrossAttentionReader(owner or plain_attention, STEP_KEY)
    )
    model.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, f"{WRAPPER_KEY}_subjects", follow_subjects(story, guarded)
    )


class StoryApplyConsistentSelfAttention(io.ComfyNode):
    """Patch a model so that the panels of a batch share self-attention tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StoryApplyConsistentSelfAttention",
            display_name="Apply Consistent Self-Attention",
            category="StoryDiffusion",
            description=(
                "Makes the panels of one latent batch look like one story: every panel also attends to tokens sampled "
                "from the other panels, so faces, hair and clothes come out alike. No training, no reference image."
            ),
            search_aliases=[
                "StoryDiffusion",
                "CSA",
                "consistent characters",
                "consistent self attention",
                "comic",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 or SDXL model."),
                io.Float.Input(
                    "sampling_rate",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of each other panel's tokens that a panel also attends to. Below 0.5 characters "
                    "drift apart, above it the panels' backgrounds begin to look alike. 0 switches sharing off.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Which tokens are sampled. One seed samples the same ones on every run and device.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling after which sharing begins. The first steps decide much of a "
                    "character's look: starting later makes panels freer and less alike.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling after which sharing ends. Ending earlier saves time and leaves the "
                    "last details to each panel.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=BLOCK_CHOICES,
                    default="decoder",
                    tooltip="Where in the UNet panels share. decoder: as the paper's code. decoder_upper_levels: "
                    "leaves the coarsest decoder level alone: cheaper, and meant to keep poses varied. all: encoder "
                    "and middle too; slower.",
                ),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Panels that the model sees at once; 0: all. A longer story is drawn in windows of this "
                    "many panels. Every window also holds the panels in which its "
                    "characters first appear.",
                    advanced=True,
                ),
                StoryType.Input(
                    "story",
                    optional=True,
                    tooltip="With a story, a panel only shares with panels that have a character in common, a "
                    "character's tokens only reach that character, and [NC] panels stay plain. Without one, all "
                    "panels share.",
                ),
                io.Float.Input(
                    "strength",
                    optional=True,
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much a panel heeds the other panels' tokens beside its own. Lower lets panels differ "
                    "more in everything at once; 1 is the paper's, 0 switches sharing off.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "share",
                    options=SHARE_CHOICES,
                    optional=True,
                    default="everything",
                    tooltip="everything: backgrounds are shared as well, as in the paper. subjects: only tokens of "
                    "the characters are (needs a story), so scenes stay each panel's own.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "token_choice",
                    options=TOKEN_CHOICES,
                    optional=True,
                    default="random",
                    tooltip="random: other tokens at every step, as in the paper, so that in time all are seen. grid: "
                    "the same evenly spaced tokens at every step.",
                    advanced=True,
                ),
                io.String.Input(
                    "level_rates",
                    optional=True,
                    default="",
                    placeholder="2: 0.3, 4: 0.7",
                    tooltip="Sampling rates of single levels of the UNet, by downsampling (SDXL: 2 and 4; SD1.5: 1, 2 "
                    "and 4): fine levels carry colours and texture, coarse ones shape and pose. Empty: sampling_rate "
                    "everywhere.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, to be sampled with one panel per row of the latent batch.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        sampling_rate: float,
        seed: int,
        start_percent: float,
        end_percent: float,
        blocks: str,
        window: int,
        story: Story | None = None,
        strength: float = 1.0,
        share: str = "everything",
        token_choice: str = "random",
        level_rates: str = "",
    ) -> io.NodeOutput:
        """Clone the model and attach the patches."""
        if start_percent >= end_percent:
            raise ValueError(f"start_percent is {start_percent}; it must be below end_percent, which is {end_percent}.")
        sampled_token_count(1, sampling_rate)  # refuses a rate out of range before any sampling starts
        for name, value, allowed in (("share", share, SHARE_CHOICES), ("token_choice", token_choice, TOKEN_CHOICES)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it must lie between 0 and 1.")
        all_blocks = self_attention_blocks(require_unet(model))
        chosen = choose_blocks(all_blocks, blocks)
        schedule = model.get_model_object("model_sampling")
        settings = SharingSettings(
            sampling_rate=sampling_rate,
            seed=seed,
            sigma_start=schedule.percent_to_sigma(start_percent),
            sigma_end=schedule.percent_to_sigma(end_percent),
            sources=story_sources(story) if story else None,
            strength=strength,
            level_rates=parse_level_rates(level_rates, chosen),
            token_choice=token_choice,
            subjects_only=share == "subjects",
        )
        guarded = panels_to_guard(story, settings)
        model = model.clone()
        model.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.OUTER_SAMPLE,
            WRAPPER_KEY,
            require_matching_rows(len(story.panels) if story else None),
        )
        share_tokens(model, settings, chosen, guarded=bool(guarded))
        if story and guarded:
            watch_subjects(model, decoder_blocks(all_blocks), story, guarded)
        if window:
            evaluate_in_windows(model, window, [panel.characters for panel in story.panels] if story else None)
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, PREVIEW_KEY, preview_all_panels)
        return io.NodeOutput(model)
