"""Node: Apply Consistent Self-Attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.patcher_extension
from comfy_api.latest import io

from .attention_patch import (
    AttentionBlock,
    BlockKey,
    ConsistentSelfAttentionPatch,
    SharingSettings,
    note_step,
    require_matching_rows,
    self_attention_blocks,
)
from .story_text import Story
from .story_type import StoryType
from .token_sharing import panels_sharing_a_character, sampled_token_count
from .window_handler import evaluate_in_windows

WRAPPER_KEY = "storydiffusion_consistent_self_attention"
BLOCK_CHOICES = ["decoder", "decoder_upper_levels", "all"]


def choose_blocks(blocks: Sequence[AttentionBlock], choice: str) -> list[BlockKey]:
    """Keys of the blocks that `choice`, one of BLOCK_CHOICES, stands for."""
    if choice == "all":
        return [block.key for block in blocks]
    decoder = [block for block in blocks if block.key[0] == "output"]
    if choice == "decoder":
        return [block.key for block in decoder]
    if choice == "decoder_upper_levels":
        lowest = max(block.downsampling for block in decoder)
        return [block.key for block in decoder if block.downsampling < lowest]
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


def share_tokens(model: Any, settings: SharingSettings, keys: Sequence[BlockKey]) -> None:
    """Attach Consistent Self-Attention to the blocks `keys` of `model`, a clone, around what owns them already."""
    owned = model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    for name, number in keys:
        # An owner by (block, number, depth) would win over one by (block, number): wrap each where it is.
        owners = {owner: patch for owner, patch in owned.items() if owner[:2] == (name, number)}
        if any(isinstance(patch, ConsistentSelfAttentionPatch) for patch in owners.values()):
            raise ValueError(
                "This model has Consistent Self-Attention already. Remove one of the two Apply Consistent "
                "Self-Attention nodes, or connect this one to the model from before the other."
            )
        for owner, patch in {(name, number): None, **owners}.items():
            own = ConsistentSelfAttentionPatch(settings, *([patch] if patch else []))
            model.set_model_attn1_replace(own, name, number, owner[2] if len(owner) == 3 else None)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, WRAPPER_KEY, note_step)


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
                    "leaves the coarsest decoder level alone, so poses stay more varied. all: encoder and middle too; "
                    "slower.",
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
                    tooltip="With a story, a panel only shares with panels that have a character in common, and "
                    "[NC] panels stay plain. Without one, all panels share.",
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
    ) -> io.NodeOutput:
        """Clone the model and attach the patches."""
        if start_percent >= end_percent:
            raise ValueError(f"start_percent is {start_percent}; it must be below end_percent, which is {end_percent}.")
        sampled_token_count(1, sampling_rate)  # refuses a rate out of range before any sampling starts
        keys = choose_blocks(self_attention_blocks(require_unet(model)), blocks)
        casts = [panel.characters for panel in story.panels] if story else None
        schedule = model.get_model_object("model_sampling")
        settings = SharingSettings(
            sampling_rate=sampling_rate,
            seed=seed,
            sigma_start=schedule.percent_to_sigma(start_percent),
            sigma_end=schedule.percent_to_sigma(end_percent),
            sources=story_sources(story) if story else None,
        )
        model = model.clone()
        share_tokens(model, settings, keys)
        if window:
            evaluate_in_windows(model, window, casts)
        model.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.OUTER_SAMPLE,
            WRAPPER_KEY,
            require_matching_rows(len(story.panels) if story else None),
        )
        return io.NodeOutput(model)
