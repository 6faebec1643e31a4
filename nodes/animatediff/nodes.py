"""Nodes: Load Motion Module, Apply Motion Module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import folder_paths
from comfy_api.latest import io

from .injection import apply_motion_module
from .loader import FOLDER_NAME, load_motion_module
from .schedule import LINEAR_BETAS, MODEL_BETAS
from .socket import MotionModuleType

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class StoryLoadMotionModule(io.ComfyNode):
    """Load an AnimateDiff motion module."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryLoadMotionModule",
            display_name="Load Motion Module",
            category="StoryDiffusion/video",
            description="Loads an AnimateDiff v2 or v3 motion module, which turns SD1.5 into a video model.",
            search_aliases=["AnimateDiff", "motion model", "mm_sd_v15_v2", "v3_sd15_mm", "video"],
            inputs=[
                io.Combo.Input(
                    "motion_module_name",
                    options=folder_paths.get_filename_list(FOLDER_NAME),
                    tooltip="A file from models/animatediff_models: AnimateDiff v2 or v3 for SD1.5, as .safetensors "
                    "or .ckpt, or diffusers' MotionAdapter.",
                ),
            ],
            outputs=[MotionModuleType.Output(display_name="motion_module", tooltip="For Apply Motion Module.")],
        )

    @classmethod
    def execute(cls, motion_module_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_motion_module(folder_paths.get_full_path_or_raise(FOLDER_NAME, motion_module_name)))


class StoryApplyMotionModule(io.ComfyNode):
    """Patch an SD1.5 model so that the images of a batch become the frames of a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryApplyMotionModule",
            display_name="Apply Motion Module",
            category="StoryDiffusion/video",
            description=(
                "Turns the images of one latent batch into the frames of one video: an AnimateDiff motion module "
                "lets every pixel look at itself in the other frames."
            ),
            search_aliases=["AnimateDiff", "motion model", "video", "animate"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model. Any checkpoint and LoRA will do."),
                MotionModuleType.Input("motion_module", tooltip="From Load Motion Module."),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How much the motion module adds to the frames. Lower loosens the frames from one "
                    "another. 0 gives the model back unchanged, its noise schedule included.",
                ),
                io.Combo.Input(
                    "beta_schedule",
                    options=[LINEAR_BETAS, MODEL_BETAS],
                    default=LINEAR_BETAS,
                    tooltip="Noise schedule. AnimateDiff was trained with linear betas; with SD1.5's own the video "
                    "looks washed out. from the model: for motion modules trained with the model's own schedule.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, to be sampled with one frame per row of the batch.")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, motion_module: ModelPatcher, scale: float = 1.0, beta_schedule: str = LINEAR_BETAS
    ) -> io.NodeOutput:
        return io.NodeOutput(apply_motion_module(model, motion_module, scale, beta_schedule))
