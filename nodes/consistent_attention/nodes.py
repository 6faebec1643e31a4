"""Node: Apply Consistent Self-Attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.noise_level import StepNote
from ..host.unet import blocks_with_attention
from ..story.socket import StoryType
from .attach import attach_sharing
from .blocks import BLOCK_CHOICES, choose_blocks, require_unet
from .level_rates import parse_level_rates
from .settings import SHARE_CHOICES, TOKEN_CHOICES, SharingSettings
from .sources import story_sources

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..story.model import Story


class StoryApplyConsistentSelfAttention(io.ComfyNode):
    """Patch a model so that the panels of a batch share self-attention tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
        model: ModelPatcher,
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
        chosen = choose_blocks(blocks_with_attention(require_unet(model)), blocks)
        settings = SharingSettings(
            sampling_rate=sampling_rate,
            seed=seed,
            sources=story_sources(story) if story else None,
            strength=strength,
            weights=[panel.weight for panel in story.panels] if story else None,
            level_rates=parse_level_rates(level_rates, {block.downsampling for block in chosen}),
            token_choice=token_choice,
            share=share,
        )
        during = StepNote(start_percent, end_percent)
        return io.NodeOutput(attach_sharing(model, settings, chosen, story, window=window, during=during))
