"""Node: SMP Video Decode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.samplers
from comfy_api.latest import io

from ..animatediff.socket import MotionModuleType
from ..motion_predictor.socket import SMPEmbedsType, SMPType
from .anchoring import ANCHORS
from .decode import Transitions, draw_video
from .sampling import SEEDS, SamplerSettings

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE
    from torch import Tensor

    from ..host.types import Conditioning
    from ..motion_predictor.loading import LoadedSMP
    from ..motion_predictor.predict import SMPEmbeds


class StorySMPVideoDecode(io.ComfyNode):
    """Sample and decode the transition between every two neighbouring panels, and join them to one video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StorySMPVideoDecode",
            display_name="SMP Video Decode",
            category="StoryDiffusion/video",
            description=(
                "Turns predicted motion into a video: samples one transition after the other with SD1.5 and a motion "
                "module, and joins them so that every panel is shown once."
            ),
            search_aliases=["StoryDiffusion", "SMP", "transition", "AnimateDiff", "story to video", "in-between"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model, with a motion module applied or given below."),
                SMPType.Input("smp", tooltip="From Load SMP: the one that smp_embeds were predicted with."),
                SMPEmbedsType.Input(
                    "smp_embeds", tooltip="From Semantic Motion Predictor. Says how many frames a transition has."
                ),
                io.Image.Input(
                    "panels",
                    tooltip="The panels that Semantic Motion Predictor has, in the video's size: SD1.5 draws best at "
                    "512 x 512.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="One row for the whole video, one per transition, or one per panel (Encode Story Prompts "
                    "with SD1.5's CLIP): then the text goes evenly from each panel's to the next one's.",
                ),
                io.Conditioning.Input(
                    "negative", tooltip="As positive: one row, one per transition, or one per panel."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the SD1.5 checkpoint."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEEDS - 1,
                    control_after_generate=True,
                    tooltip="Noise of the first transition; each later one has the next seed.",
                ),
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip="Sampling steps of each transition."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely the frames follow text and motion tokens.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="ddim",
                    tooltip="The paper uses ddim.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="ddim_uniform",
                    tooltip="How noise falls from step to step.",
                ),
                io.Combo.Input(
                    "anchor",
                    options=list(ANCHORS),
                    default="hold",
                    tooltip="What ties a transition to its two panels. hold: the first and the last frame are the "
                    "panels. soft neighbours: the two frames next to each follow it too, for part of sampling, against "
                    "a jump. release late: the ends are let go near the end of sampling, and come out close to the "
                    "panels. off: only the motion tokens.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How much the motion tokens weigh against the text. 0 leaves them out.",
                ),
                io.Float.Input(
                    "fps",
                    default=8.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second, for Create Video. It changes no frame; AnimateDiff moves as filmed at "
                    "8.",
                ),
                MotionModuleType.Input(
                    "motion_module",
                    optional=True,
                    tooltip="From Load Motion Module, if the model has none yet. Without any, every frame is a picture "
                    "of its own.",
                ),
            ],
            outputs=[
                io.Image.Output("frames", tooltip="The video: P transitions of F frames give P * (F - 1) + 1."),
                io.Int.Output("frame_count", tooltip="How many frames there are."),
                io.Float.Output("fps", tooltip="For Create Video."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        smp: LoadedSMP,
        smp_embeds: SMPEmbeds,
        panels: Tensor,
        positive: Conditioning,
        negative: Conditioning,
        vae: VAE,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        anchor: str,
        strength: float,
        fps: float,
        motion_module: ModelPatcher | None = None,
    ) -> io.NodeOutput:
        video = draw_video(
            model,
            motion_module,
            Transitions(smp, smp_embeds, panels, strength, anchor),
            (positive, negative),
            vae,
            SamplerSettings(seed, steps, cfg, sampler_name, scheduler),
        )
        return io.NodeOutput(video, video.shape[0], fps)
