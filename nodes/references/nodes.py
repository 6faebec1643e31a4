"""Node: Add Reference Panels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..story.socket import StoryType
from .panels import DEFAULT_WEIGHT, GREATEST_WEIGHT, LEAST_WEIGHT, add_reference_panels, read_references
from .rows import add_reference_rows, require_a_row_each, require_pictures

if TYPE_CHECKING:
    import torch
    from comfy.sd import VAE

    from ..host.types import Latent
    from ..story.model import Story


class StoryAddReferencePanels(io.ComfyNode):
    """Put given pictures in front of a story, for its panels to be drawn after."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryAddReferencePanels",
            display_name="Add Reference Panels",
            category="StoryDiffusion",
            description=(
                "Puts pictures of your own in front of a story: a character to draw, or panels of an earlier chapter. "
                "They stay as they are, and Consistent Self-Attention makes the story's panels look like them."
            ),
            search_aliases=["StoryDiffusion", "reference image", "my own character", "continue story", "keep panels"],
            inputs=[
                StoryType.Input("story", tooltip="The story to draw, from Story Prompt Splitter."),
                io.Latent.Input("latent", tooltip="The panels' latent batch, one row per panel of the story."),
                io.Image.Input("images", tooltip="The reference pictures, in the size of the panels."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint, to encode the pictures."),
                io.String.Input(
                    "references",
                    multiline=True,
                    placeholder="[Bob] stands in front of a white wall",
                    tooltip="One line per picture, written like a panel of the story: who stands in it, and what it "
                    "shows. Panels look at the pictures in which their characters stand.",
                ),
                io.String.Input(
                    "characters",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip="The same character sheet as in Story Prompt Splitter.",
                ),
                io.Float.Input(
                    "weight",
                    optional=True,
                    default=DEFAULT_WEIGHT,
                    min=LEAST_WEIGHT,
                    max=GREATEST_WEIGHT,
                    step=0.1,
                    tooltip="How much panels heed the pictures beside their own tokens. At 1, as much as one another, "
                    "they follow a picture little. Higher makes them more like it, at last in scene as well.",
                ),
            ],
            outputs=[
                StoryType.Output(
                    display_name="story",
                    tooltip="References and panels, for Encode Story Prompts and Apply Consistent Self-Attention. "
                    "Story Contact Sheet takes that of Story Prompt Splitter.",
                ),
                io.Latent.Output(display_name="latent", tooltip="References and panels, for the KSampler."),
                io.Int.Output(
                    display_name="reference_count",
                    tooltip="Number of pictures in front. To keep the panels only, put Get Image from Batch after "
                    "decoding, with this as batch_index and panel_count of Story Prompt Splitter as length.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        story: Story,
        latent: Latent,
        images: torch.Tensor,
        vae: VAE,
        references: str,
        characters: str = "",
        weight: float = DEFAULT_WEIGHT,
    ) -> io.NodeOutput:
        require_a_row_each(story, latent)
        require_pictures(images)
        pictures = read_references(references, characters, images.shape[0], weight)
        story = add_reference_panels(story, pictures)
        encoded = vae.encode(images[..., :3])
        return io.NodeOutput(story, add_reference_rows(latent, encoded), images.shape[0])
