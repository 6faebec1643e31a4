"""Node: SMP Video Decode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from .anchoring import ANCHORS
from .clip_joining import joined_length, write_clips
from .motion_injection import MOTION_KEY
from .motion_nodes import MotionModuleType, StoryApplyMotionModule
from .pair_conditioning import conditioning_of_pair
from .panel_conditioning import Conditioning
from .smp_models import LoadedSMP, SMPEmbeds
from .smp_nodes import SMPEmbedsType, SMPType
from .smp_patch import apply_smp, require_sites
from .transition_sampling import SEEDS, SamplerSettings, hold_ends, progress_over_pairs, sample_transition


def require_panels(panels: Tensor, smp_embeds: SMPEmbeds) -> None:
    """ValueError unless `panels`, (N, H, W, C), are as many as the transitions of `smp_embeds` need."""
    count, pairs = panels.shape[0], smp_embeds.tokens.shape[0]
    if count < 2:
        raise ValueError(
            f"panels holds {count} panel; a transition needs two. Connect the batch of panels that Semantic Motion "
            "Predictor has."
        )
    if count != pairs + 1:
        raise ValueError(
            f"panels holds {count} panels, which have {count - 1} transitions between them, but smp_embeds holds "
            f"{pairs}. Connect the same panels here and to Semantic Motion Predictor."
        )


def require_vae(model: Any, vae: Any, panels: Tensor) -> None:
    """ValueError unless `vae` makes the latents that `model` denoises, and the panels divide into them."""
    wanted = model.get_model_object("latent_format").latent_channels
    if vae.latent_channels != wanted:
        raise ValueError(
            f"vae makes latents with {vae.latent_channels} channels, but the model's have {wanted}. Connect the VAE "
            "of the SD1.5 checkpoint."
        )
    step = vae.spacial_compression_encode()
    height, width = panels.shape[1:3]
    if height % step or width % step:
        raise ValueError(
            f"panels are {width} x {height} pixels; width and height must be multiples of {step}. Put Upscale Image "
            f"before, for example to {max(width // step, 1) * step} x {max(height // step, 1) * step}."
        )


def panel_latents(model: Any, vae: Any, panels: Tensor, *, encode: bool) -> Tensor:
    """Return latents (N, C, h, w) of the panels, or, where nothing will be held to them, as large zeros."""
    if encode:
        return vae.encode(panels[..., :3])
    step = vae.spacial_compression_encode()
    channels = model.get_model_object("latent_format").latent_channels
    height, width = panels.shape[1] // step, panels.shape[2] // step
    device = comfy.model_management.intermediate_device()
    return torch.zeros(panels.shape[0], channels, height, width, device=device)


def decode_transitions(
    model: Any,
    smp: LoadedSMP,
    embeds: SMPEmbeds,
    strength: float,
    conditioning: tuple[Conditioning, Conditioning],
    vae: Any,
    latents: Tensor,
    ramp: tuple[float, ...],
    settings: SamplerSettings,
) -> Iterator[Tensor]:
    """Yield the frames (F, H, W, 3) of one transition after the other; only one is in memory here."""
    pairs, frames = embeds.tokens.shape[:2]
    callback_of = progress_over_pairs(model, pairs)
    for pair in range(pairs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        positive, negative = (
            conditioning_of_pair(entries, name, pair, pairs, frames)
            for entries, name in zip(conditioning, ("positive", "negative"), strict=True)
        )
        guided = apply_smp(model, smp, embeds, pair, smp.config.guidance, strength)
        held, canvas = hold_ends(guided, latents[pair], latents[pair + 1], frames, ramp)
        clip = sample_transition(held, positive, negative, canvas, settings, pair, callback_of(pair))
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield vae.decode(clip)


class StorySMPVideoDecode(io.ComfyNode):
    """Sample and decode the transition between every two neighbouring panels, and join them to one video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
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
        model: Any,
        smp: LoadedSMP,
        smp_embeds: SMPEmbeds,
        panels: Tensor,
        positive: Conditioning,
        negative: Conditioning,
        vae: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        anchor: str,
        strength: float,
        fps: float,
        motion_module: Any = None,
    ) -> io.NodeOutput:
        """Sample, decode and join, pair by pair."""
        require_sites(model, smp.config)
        require_panels(panels, smp_embeds)
        require_vae(model, vae, panels)
        if motion_module is not None:
            model = StoryApplyMotionModule.execute(model, motion_module).args[0]
        elif not model.get_additional_models_with_key(MOTION_KEY):  # another pack's module would not be seen here
            logging.warning(
                "SMP Video Decode: neither motion_module nor Apply Motion Module is connected. Unless another pack "
                "moves this model, each frame will be a picture of its own."
            )
        ramp = ANCHORS[anchor]
        latents = panel_latents(model, vae, panels, encode=bool(ramp))
        clips = decode_transitions(
            model,
            smp,
            smp_embeds,
            strength,
            (positive, negative),
            vae,
            latents,
            ramp,
            SamplerSettings(seed, steps, cfg, sampler_name, scheduler),
        )
        pairs, frames = smp_embeds.tokens.shape[:2]
        video = write_clips(clips, joined_length([frames] * pairs))
        return io.NodeOutput(video, video.shape[0], fps)
