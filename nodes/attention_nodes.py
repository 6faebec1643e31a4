"""Node: Apply Consistent Self-Attention."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
from comfy_api.latest import io

from .attach_sharing import (
    BLOCK_CHOICES,
    choose_blocks,
    decoder_blocks,
    panels_to_guard,
    parse_level_rates,
    require_unet,
    share_tokens,
    story_sources,
    watch_subjects,
)
from .attention_patch import SharingSettings, self_attention_blocks
from .panel_preview import PREVIEW_KEY, preview_all_panels
from .sampling_step import StepNote
from .sharing_checks import check_runs
from .story_text import Story
from .story_type import StoryType
from .token_sharing import sampled_token_count
from .window_handler import evaluate_in_windows

SHARE_CHOICES = ["everything", "subjects"]
TOKEN_CHOICES = ["random", "grid"]


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
                    "and 4). On the pack's own small model the finer level alone carries the likeness. Empty: "
                    "sampling_rate everywhere.",
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
        if window == 1 and story is None:
            raise ValueError("window is 1, in which no panel sees another; it must be 0 (no windows), or 2 or more.")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it must lie between 0 and 1.")
        all_blocks = self_attention_blocks(require_unet(model))
        chosen = choose_blocks(all_blocks, blocks)
        settings = SharingSettings(
            sampling_rate=sampling_rate,
            seed=seed,
            sources=story_sources(story) if story else None,
            strength=strength,
            weights=[panel.weight for panel in story.panels] if story else None,
            level_rates=parse_level_rates(level_rates, chosen),
            token_choice=token_choice,
            subjects_only=share == "subjects",
        )
        guarded = panels_to_guard(story, settings)
        model = model.clone()
        check_runs(model, chosen, story)
        share_tokens(model, settings, chosen, guarded=bool(guarded), during=StepNote(start_percent, end_percent))
        if story and guarded and settings.shares:
            watch_subjects(model, decoder_blocks(all_blocks), story, guarded)
        if window:
            evaluate_in_windows(model, window, [panel.characters for panel in story.panels] if story else None)
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, PREVIEW_KEY, preview_all_panels)
        return io.NodeOutput(model)
