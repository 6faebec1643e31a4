"""Nodes: Load SMP, Semantic Motion Predictor, Apply SMP Guidance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

from ..smp.checkpoint import load_checkpoint
from ..smp.config import Guidance, Interpolation
from ..smp.images import square_crop
from ..smp.ip_adapter import load_ip_adapter
from ..smp.model import SMPWeights
from .model_files import read_weights, register_model_folder
from .smp_models import LoadedSMP, SMPEmbeds, load_smp, predict_motion
from .smp_patch import apply_smp

SMP_FOLDER = "smp"
IP_ADAPTER_FOLDER = "ipadapter"
NO_FILE = "none"
INTERPOLATIONS: dict[str, Interpolation] = {
    "interpolation (linear)": "linear",
    "interpolation (spherical)": "spherical",
}
AS_TRAINED = "as trained"

SMPType = io.Custom("STORY_SMP")
SMPEmbedsType = io.Custom("STORY_SMP_EMBEDS")


register_model_folder(SMP_FOLDER, {".safetensors"})
register_model_folder(IP_ADAPTER_FOLDER, {".safetensors", ".bin"})


def smp_source(smp_name: str, ip_adapter_name: str) -> tuple[Callable[[], SMPWeights], str]:
    """A function that reads the chosen weights, and one sentence that says what they are.

    Raises:
        ValueError: interpolation without IP-Adapter weights, or IP-Adapter weights beside an SMP checkpoint.
    """
    interpolation = INTERPOLATIONS.get(smp_name)
    if interpolation is None:
        if ip_adapter_name != NO_FILE:
            raise ValueError(
                f"The SMP checkpoint '{smp_name}' brings its own projections, so ip_adapter must be "
                f"'{NO_FILE}'; it is '{ip_adapter_name}'."
            )
        path = Path(folder_paths.get_full_path_or_raise(SMP_FOLDER, smp_name))
        return lambda: load_checkpoint(path), f"Trained SMP: '{smp_name}' predicts the motion."
    if ip_adapter_name == NO_FILE:
        raise ValueError(
            f"smp is '{smp_name}', which has no decoder of its own: choose IP-Adapter weights for SD1.5 "
            "(ip-adapter_sd15 or ip-adapter-plus_sd15) from models/ipadapter."
        )
    path = Path(folder_paths.get_full_path_or_raise(IP_ADAPTER_FOLDER, ip_adapter_name))
    summary = (
        f"No trained SMP: {interpolation} interpolation between the panels' image tokens, decoded by the "
        f"IP-Adapter weights '{ip_adapter_name}'."
    )
    return lambda: _read_ip_adapter(path, interpolation), summary


def _read_ip_adapter(path: Path, interpolation: Interpolation) -> SMPWeights:
    file = read_weights(path, "an IP-Adapter")
    try:
        return load_ip_adapter(dict(file), interpolation=interpolation)
    except ValueError as error:
        raise ValueError(f"'{path.name}' cannot be used by Load SMP. {error}") from error


class StoryLoadSMP(io.ComfyNode):
    """Load a trained SMP, or interpolation with IP-Adapter weights in its place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
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
        """Load the chosen weights."""
        read, summary = smp_source(smp, ip_adapter)
        return io.NodeOutput(load_smp(read, summary), summary)


def encode_panels(clip_vision: Any, smp: LoadedSMP, images: torch.Tensor) -> torch.Tensor:
    """What `smp` reads of each image, from a core CLIP_VISION: (M, H, W, 3) -> (M, E) or (M, T, E).

    Images are cropped to their centre square first: on a square, the host's encoder and open_clip's agree.

    Raises:
        ValueError: a CLIP vision model of another width than the SMP was made for.
    """
    output = clip_vision.encode_image(square_crop(images[..., :3]))
    resampled = smp.config.token_space == "resampled"
    features = output["penultimate_hidden_states"] if resampled else output["image_embeds"]
    what = "hidden states" if resampled else "image embeddings"
    if features.shape[-1] != smp.config.encoder_width:
        raise ValueError(
            f"The connected CLIP vision model gives {what} of width {features.shape[-1]}, but this SMP "
            f"reads width {smp.config.encoder_width}. {_encoder_advice(smp)}"
        )
    return features


def _encoder_advice(smp: LoadedSMP) -> str:
    width = (smp.config.token_space, smp.config.encoder_width)
    known = {
        ("image_embeds", 1024): "CLIP-ViT-H-14-laion2B-s32B-b79K",
        ("resampled", 1280): "CLIP-ViT-H-14-laion2B-s32B-b79K",
        ("image_embeds", 1280): "CLIP-ViT-bigG-14-laion2B-39B-b160k (IP-Adapter's vit-G files are made for it)",
    }
    return f"Load {known[width]}." if width in known else "Load the one that it was trained with."


def encode_blank(clip_vision: Any, smp: LoadedSMP) -> torch.Tensor:
    """What `smp` reads of the blank image, whose normalised pixels are exactly zero: (1, E) or (1, T, E).

    `encode_image` would round the blank image's grey to 8 bits, and away from zero.
    """
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    size = clip_vision.image_size
    pixels = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    output = clip_vision.model(pixel_values=pixels, intermediate_output=-2)
    return output[1] if smp.config.token_space == "resampled" else output[2]


class StorySemanticMotionPredictor(io.ComfyNode):
    """Predict the motion tokens of every transition between neighbouring panels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
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
    def execute(cls, clip_vision: Any, smp: LoadedSMP, images: torch.Tensor, frames: int) -> io.NodeOutput:
        """Encode the panels and predict."""
        if images.shape[0] < 2:
            raise ValueError(
                f"images holds {images.shape[0]} panel; a transition needs two. Connect a batch of at least two panels."
            )
        features = encode_panels(clip_vision, smp, images)
        blank = encode_blank(clip_vision, smp) if smp.config.uncond == "blank_image" else None
        embeds = predict_motion(smp, features, blank, frames)
        return io.NodeOutput(embeds, describe(smp, embeds))


def describe(smp: LoadedSMP, embeds: SMPEmbeds) -> str:
    """What was predicted, for users."""
    pairs, frames, tokens, width = embeds.tokens.shape
    lines = [
        smp.summary,
        f"Transitions: {pairs}, of {frames} frames; {tokens} tokens of width {width} a frame.",
    ]
    predictor = smp.config.predictor
    if predictor is not None and frames > predictor.max_frames:
        lines.append(
            f"The predictor was trained on up to {predictor.max_frames} frames: {frames} sample the same "
            "motion more finely, which it was not trained for."
        )
    return "\n".join(lines)


class StoryApplySMP(io.ComfyNode):
    """Guide every frame of a clip with its predicted motion tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
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
        model: Any,
        smp: LoadedSMP,
        smp_embeds: SMPEmbeds,
        pair_index: int,
        strength: float,
        guidance: str,
    ) -> io.NodeOutput:
        """Clone the model and attach the guidance."""
        chosen = smp.config.guidance if guidance == AS_TRAINED else cast(Guidance, guidance)
        return io.NodeOutput(apply_smp(model, smp, smp_embeds, pair_index, chosen, strength))
