"""Predicted motion to a video: one transition after the other is sampled, decoded and joined to the last."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_management
import torch
from torch import Tensor

from ..animatediff.injection import MOTION_KEY, apply_motion_module
from ..clips.joining import joined_length, write_clips
from ..host.types import Conditioning
from ..motion_predictor.loading import LoadedSMP
from ..motion_predictor.patch import apply_smp, require_sites
from ..motion_predictor.predict import SMPEmbeds
from .anchoring import ANCHORS
from .conditioning import conditioning_of_pair
from .sampling import SamplerSettings, hold_ends, progress_over_pairs, sample_transition

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE


@dataclass(frozen=True)
class Transitions:
    """What is drawn: the motion that an SMP predicts between panels.

    Attributes:
        smp: the SMP that predicted `embeds`.
        embeds: P transitions of F frames.
        panels: (P + 1, H, W, C).
        strength: weight of the motion tokens against the text.
        anchor: what ties a transition to its panels, one of `anchoring.ANCHORS`.
    """

    smp: LoadedSMP
    embeds: SMPEmbeds
    panels: Tensor
    strength: float
    anchor: str


def draw_video(
    model: ModelPatcher,
    motion_module: ModelPatcher | None,
    transitions: Transitions,
    conditioning: tuple[Conditioning, Conditioning],
    vae: VAE,
    settings: SamplerSettings,
) -> Tensor:
    """Sample, decode and join, pair by pair.

    Args:
        model: SD1.5, with a motion module or without.
        motion_module: one to be applied, or None.
        transitions: what is drawn.
        conditioning: positive and negative, as `conditioning_of_pair` takes them.
        vae: SD1.5's.
        settings: the sampler's.

    Returns:
        (P * (F - 1) + 1, H, W, C)

    Raises:
        ValueError: parts that don't fit one another.
    """
    embeds = transitions.embeds
    require_sites(model, transitions.smp)
    require_panels(transitions.panels, embeds)
    require_vae(model, vae, transitions.panels)
    if motion_module is not None:
        model = apply_motion_module(model, motion_module)
    elif not model.get_additional_models_with_key(MOTION_KEY):  # another pack's module would not be seen here
        logging.warning(
            "SMP Video Decode: neither motion_module nor Apply Motion Module is connected. Unless another pack "
            "moves this model, each frame will be a picture of its own."
        )
    pairs, frames = embeds.tokens.shape[:2]
    clips = decode_transitions(model, transitions, conditioning, vae, settings)
    return write_clips(clips, joined_length([frames] * pairs))


def decode_transitions(
    model: ModelPatcher,
    transitions: Transitions,
    conditioning: tuple[Conditioning, Conditioning],
    vae: VAE,
    settings: SamplerSettings,
) -> Iterator[Tensor]:
    """Yield the frames (F, H, W, 3) of one transition after the other; only one is in memory here."""
    smp, embeds, ramp = transitions.smp, transitions.embeds, ANCHORS[transitions.anchor]
    latents = panel_latents(model, vae, transitions.panels, encode=bool(ramp))
    pairs, frames = embeds.tokens.shape[:2]
    callback_of = progress_over_pairs(model, pairs)
    for pair in range(pairs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        positive, negative = (
            conditioning_of_pair(entries, name, pair, pairs, frames)
            for entries, name in zip(conditioning, ("positive", "negative"), strict=True)
        )
        guided = apply_smp(model, smp, embeds, pair, smp.config.guidance, transitions.strength)
        held, canvas = hold_ends(guided, latents[pair], latents[pair + 1], frames, ramp)
        clip = sample_transition(held, positive, negative, canvas, settings, pair, callback_of(pair))
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield vae.decode(clip)


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


def require_vae(model: ModelPatcher, vae: VAE, panels: Tensor) -> None:
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


def panel_latents(model: ModelPatcher, vae: VAE, panels: Tensor, *, encode: bool) -> Tensor:
    """Latents (N, C, h, w) of the panels, or, where nothing will be held to them, as large zeros."""
    if encode:
        return vae.encode(panels[..., :3])
    step = vae.spacial_compression_encode()
    channels = model.get_model_object("latent_format").latent_channels
    height, width = panels.shape[1] // step, panels.shape[2] // step
    device = comfy.model_management.intermediate_device()
    return torch.zeros(panels.shape[0], channels, height, width, device=device)
