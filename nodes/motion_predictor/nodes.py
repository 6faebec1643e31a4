"""Nodes: Load SMP, Semantic Motion Predictor, Apply SMP Guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import folder_paths
from comfy_api.latest import io

from .loading import INTERPOLATIONS, IP_ADAPTER_FOLDER, NO_FILE, SMP_FOLDER, load_smp, smp_source
from .patch import AS_TRAINED, apply_smp
from .predict import describe, predict_transitions
from .socket import SMPEmbedsType, SMPType

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from .loading import LoadedSMP
    from .predict import SMPEmbeds


class StoryLoadSMP(io.ComfyNode):
    """Load a trained SMP, or interpolation with IP-Adapter weights in its place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoadSMP",
            display_name="Load SMP",
            category="StoryDiffusion/video",
            description=(
                "Loads what turns two panels into a transition: a trained Semantic Motion Predictor (SMP) "
                "from models/smp, or, with no trained file, plain interpolation decoded by IP-Adapter "
                "weights."
            ),
            search_aliases=["StoryDiffusion", "semantic motion predictor", "IP-Adapter", "transition"],
            is_experimental=True,
            inputs=[
                io.Combo.Input(
                    "smp",
                    options=[*INTERPOLATIONS, *folder_paths.get_filename_list(SMP_FOLDER)],
                    tooltip="A trained SMP predicts motion. Interpolation is not an SMP: it moves straight "
                    "(linear) or along a great circle (spherical) from one panel's image tokens to the next "
                    "one's.",
                ),
                io.Combo.Input(
                    "ip_adapter",
                    options=[NO_FILE, *folder_paths.get_filename_list(IP_ADAPTER_FOLDER)],
                    tooltip="With interpolation: the SD1.5 IP-Adapter weights that turn image tokens into "
                    "guidance (ip-adapter_sd15 follows the panels loosely, ip-adapter-plus_sd15 closely). "
                    "With a trained SMP: none.",
                ),
            ],
            outputs=[
                SMPType.Output("smp", tooltip="Connect it to Semantic Motion Predictor and Apply SMP Guidance."),
                io.String.Output("summary", tooltip="Says whether this is a trained SMP or interpolation."),
            ],
        )

    @classmethod
    def execute(cls, smp: str, ip_adapter: str) -> io.NodeOutput:
        read, summary = smp_source(smp, ip_adapter)
        return io.NodeOutput(load_smp(read, summary), summary)


class StorySemanticMotionPredictor(io.ComfyNode):
    """Predict the motion tokens of every transition between neighbouring panels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StorySemanticMotionPredictor",
            display_name="Semantic Motion Predictor",
            category="StoryDiffusion/video",
            description=(
                "Predicts, in the image encoder's semantic space, every frame of the transition from each "
                "panel to the next. Without a trained SMP this is interpolation."
            ),
            search_aliases=["StoryDiffusion", "SMP", "transition", "in-between", "interpolate panels"],
            is_experimental=True,
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="The encoder the SMP was made for: ViT-H-14 for SD1.5."),
                SMPType.Input("smp", tooltip="From Load SMP."),
                io.Image.Input(
                    "images",
                    tooltip="The panels in order, at least two in one batch: N panels give N - 1 "
                    "transitions. Only the centre square of each is seen.",
                ),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=2,
                    max=1024,
                    tooltip="Frames of each transition, with both panels' own frames. 16 is what "
                    "AnimateDiff and the paper use; the latent batch must have as many.",
                ),
            ],
            outputs=[
                SMPEmbedsType.Output("smp_embeds", tooltip="Motion tokens of every frame of every transition."),
                io.String.Output("summary", tooltip="What was predicted, and by what."),
            ],
        )

    @classmethod
    def execute(cls, clip_vision: ClipVisionModel, smp: LoadedSMP, images: Tensor, frames: int) -> io.NodeOutput:
        embeds = predict_transitions(clip_vision, smp, images, frames)
        return io.NodeOutput(embeds, describe(smp, embeds))


class StoryApplySMP(io.ComfyNode):
    """Guide every frame of a clip with its predicted motion tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryApplySMP",
            display_name="Apply SMP Guidance",
            category="StoryDiffusion/video",
            description=(
                "Lets each frame of an SD1.5 clip attend to its own predicted motion tokens besides the "
                "text. Use it together with a motion module: the frames of one transition are the rows of "
                "the latent batch."
            ),
            search_aliases=["StoryDiffusion", "SMP", "IP-Adapter", "video guidance"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model, usually with a motion module applied."),
                SMPType.Input("smp", tooltip="From Load SMP: the one that smp_embeds were predicted with."),
                SMPEmbedsType.Input("smp_embeds", tooltip="From Semantic Motion Predictor."),
                io.Int.Input(
                    "pair_index",
                    default=0,
                    min=0,
                    max=1023,
                    tooltip="Which transition this model samples: 0 is from the first panel to the second.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How much the motion tokens weigh against the text. 0 leaves the model as it is.",
                ),
                io.Combo.Input(
                    "guidance",
                    options=[AS_TRAINED, "concat", "decoupled"],
                    default=AS_TRAINED,
                    advanced=True,
                    tooltip="How motion tokens join the text. concat: one softmax over both, as in the "
                    "paper. decoupled: a second attention, added; what IP-Adapter weights were trained for. "
                    "as trained: what the loaded weights say.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, to be sampled with one frame per row of the latent batch.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        smp: LoadedSMP,
        smp_embeds: SMPEmbeds,
        pair_index: int,
        strength: float,
        guidance: str,
    ) -> io.NodeOutput:
        return io.NodeOutput(apply_smp(model, smp, smp_embeds, pair_index, guidance, strength))
