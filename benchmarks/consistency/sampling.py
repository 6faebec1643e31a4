"""Draw stories of the toy world through the host's own sampling, with and without Consistent Self-Attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import comfy.sample
import numpy as np
import torch
from comfy.ldm.modules.attention import attention_pytorch

from ...devtools.toy import model as toy_model
from ...devtools.toy.figure import Kind
from ...devtools.toy.palette import Array
from ...devtools.toy.pixel_vae import ENLARGED
from ...devtools.toy.scenes import SCENES
from ...devtools.toy.world import POSE_NAMES, POSITION_NAMES, random_look, render, stage
from ...devtools.toy.world import Direction as Directed
from ...nodes.consistent_attention.attach import WRAPPER_KEY, share_tokens
from ...nodes.consistent_attention.blocks import decoder_blocks
from ...nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention
from ...nodes.consistent_attention.settings import SharingSettings
from ...nodes.consistent_attention.sources import all_other_panels, story_sources
from ...nodes.consistent_attention.token_sampling import draw_tokens
from ...nodes.host.noise_level import STEP_KEY, StepNote
from ...nodes.host.unet import UNetBlock, blocks_with_attention
from ...nodes.prompts.nodes import StoryEncodePrompts
from ...nodes.references.nodes import StoryAddReferencePanels
from ...nodes.references.panels import DEFAULT_WEIGHT
from ...nodes.story.model import Panel, Story
from ...nodes.windows.handler import evaluate_in_windows
from .metrics import PanelPrompt

OTHER_BLOCKS: dict[str, Callable[[UNetBlock], bool]] = {
    "encoder and middle": lambda block: block.key[0] != "output",
    "decoder, lower level": lambda block: block.key[0] == "output" and block.downsampling == 4,
}
"""Where panels share tokens in rows that the node offers no choice for."""


@dataclass(frozen=True)
class Setting:
    """One row of a table: how the panels of a story are drawn."""

    name: str
    rate: float | None = 0.5
    """Sampling rate; None draws without Consistent Self-Attention."""
    blocks: str = "decoder"
    """A choice of the node, or one of OTHER_BLOCKS."""
    start: float = 0.0
    end: float = 1.0
    strength: float = 1.0
    share: str = "everything"
    token_choice: str = "random"
    level_rates: str = ""
    window: int = 0
    anchors: bool = True
    """Whether windows hold the panels in which their characters first appear, as the node's do."""
    routed: bool = False
    """The node's `story` input: panels share tokens with those of the same character only."""
    masks: bool = True
    """Whether the tokens of a routed story pass by character, as the node lets them."""
    shuffled: bool = False
    """Control: the values of the shared tokens are dealt out among their keys anew."""
    same_noise: bool = False
    own_seeds: bool = False
    """Every panel's noise from a seed of its own, as of panels drawn one by one."""
    panels: int = 4
    reference_weight: float = DEFAULT_WEIGHT
    """Of given pictures, where there are any."""


@dataclass(frozen=True)
class Sampling:
    """The host's sampler settings; those of the shipped workflow."""

    steps: int = 50
    cfg: float = 5.0
    sampler: str = "ddim"
    scheduler: str = "ddim_uniform"


def story_prompts(stories: int, panels: int, seed: int) -> list[list[PanelPrompt]]:
    """Stories of one character whose panels differ in scene and, as far as there are five, in pose."""
    rng = np.random.default_rng(seed)
    prompts = []
    for story in range(stories):
        scenes, poses = (
            np.concatenate([rng.permutation(len(names)) for _ in range(panels)])[:panels]
            for names in (SCENES, POSE_NAMES)
        )
        positions = rng.permutation(np.arange(max(panels, 3)) % len(POSITION_NAMES))[:panels]
        prompts.append(
            [
                PanelPrompt(Kind(story % 2), SCENES[scene], POSE_NAMES[pose], POSITION_NAMES[position])
                for scene, pose, position in zip(scenes, poses, positions, strict=True)
            ]
        )
    return prompts


def rendered_stories(prompts: list[list[PanelPrompt]], seed: int, *, one_look: bool) -> Array:
    """The same panels drawn by the world itself: what perfect consistency, or none at all, measures."""
    rng = np.random.default_rng(seed)
    images = []
    for story in prompts:
        look = random_look(rng, story[0].kind)
        for panel in story:
            worn = look if one_look else random_look(rng, panel.kind)
            images.append(render(stage(rng, panel.scene, [Directed(panel.kind, panel.pose, panel.position)], [worn])))
    return np.stack(images)


@dataclass(frozen=True)
class References:
    """Given pictures for the panels to be drawn after, as Add Reference Panels takes them."""

    pictures: Array  # [R, 32, 32, 3], sRGB 0 to 1
    lines: str
    characters: str = ""


def as_story(prompts: Sequence[PanelPrompt]) -> Story:
    """The panels as Story Prompt Splitter would give them, each kind of figure one character."""
    return Story(
        tuple(
            Panel(panel.text, "", (panel.kind.name.title(),), subjects={panel.kind.name.title(): panel.subject})
            for panel in prompts
        ),
        negative="",
    )


class Painter:
    """The toy model, ready to draw stories."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.model, self.clip, self.vae = toy_model.load()
        # The host's default on a CPU saves memory; the result is the same to rounding.
        options = self.model.model_options["transformer_options"]
        options["optimized_attention_override"] = toy_model.fused_attention

    def draw(self, story: Story, setting: Setting, seed: int, references: References | None = None) -> Array:
        """One story's panels [P, 32, 32, 3], sRGB 0 to 1; `seed` makes the noise and the draw of tokens."""
        latent: dict[str, Any] = {"samples": torch.zeros(len(story.panels), 4, 32, 32)}
        if references is not None:
            pictures = (
                torch.from_numpy(references.pictures).repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)
            )
            story, latent, _ = StoryAddReferencePanels.execute(
                story, latent, pictures, self.vae, references.lines, references.characters, setting.reference_weight
            ).result
        positive, negative = StoryEncodePrompts.execute(self.clip, story).result
        noise = panel_noise(latent, seed, setting)
        images = self.sample(
            self._patched(setting, seed, story),
            noise,
            positive,
            negative,
            seed,
            latent["samples"],
            latent.get("noise_mask"),
        )
        return images if references is None else images[len(references.pictures) :]

    def sample(
        self,
        model: Any,
        noise: torch.Tensor,
        positive: Any,
        negative: Any,
        seed: int,
        latent: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
    ) -> Array:
        """Pictures [n, 32, 32, 3] that `model` makes of `noise` (n, 4, 32, 32)."""
        chosen = self.sampling
        samples = comfy.sample.sample(
            model,
            noise,
            chosen.steps,
            chosen.cfg,
            chosen.sampler,
            chosen.scheduler,
            positive,
            negative,
            torch.zeros_like(noise) if latent is None else latent,
            noise_mask=noise_mask,
            disable_pbar=True,
            seed=seed,
        )
        images: Array = self.vae.decode(samples)[:, ENLARGED // 2 :: ENLARGED, ENLARGED // 2 :: ENLARGED].numpy()
        return images

    def _patched(self, setting: Setting, seed: int, story: Story) -> Any:
        if setting.rate is None:
            return self.model
        model = self.model
        all_blocks = blocks_with_attention(model.model.diffusion_model)
        if setting.shuffled:
            model = model.clone()
            for block in decoder_blocks(all_blocks):
                model.set_model_attn1_replace(ShuffledValues(setting.rate, seed), *block.key)
            model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, WRAPPER_KEY, StepNote())
            return model
        if setting.blocks in OTHER_BLOCKS or not setting.masks:
            chosen = OTHER_BLOCKS.get(setting.blocks, lambda block: block.key[0] == "output")
            sources = story_sources(story) if setting.routed else None
            model = model.clone()
            settings = SharingSettings(setting.rate, seed, sources=sources)
            share_tokens(model, settings, [block for block in all_blocks if chosen(block)])
            return model
        patched = StoryApplyConsistentSelfAttention.execute(
            model=model,
            sampling_rate=setting.rate,
            seed=seed,
            start_percent=setting.start,
            end_percent=setting.end,
            blocks=setting.blocks,
            window=setting.window if setting.anchors else 0,
            story=story if setting.routed else None,
            strength=setting.strength,
            share=setting.share,
            token_choice=setting.token_choice,
            level_rates=setting.level_rates,
        )[0]
        if setting.window and not setting.anchors:
            evaluate_in_windows(patched, setting.window, [()] * len(story.panels))
        return patched


def panel_noise(latent: dict[str, Any], seed: int, setting: Setting) -> torch.Tensor:
    """Noise for every row: independent, as a stock sampler draws it for one batch, unless the setting says not."""
    samples = latent["samples"]
    if setting.own_seeds:
        return torch.cat([comfy.sample.prepare_noise(row[None], 1000 * seed + i) for i, row in enumerate(samples)])
    noise: torch.Tensor = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    return noise[:1].expand_as(noise).clone() if setting.same_noise else noise


@dataclass(frozen=True)
class ShuffledValues:
    """Control: the patch of a block in which other panels' keys come with the values of others of their tokens."""

    rate: float
    seed: int

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        """q, k, v: (chunks * panels, N, C); a panel's own tokens stay as they are."""
        chunks, step = len(extra_options["cond_or_uncond"]), extra_options[STEP_KEY].noise_level
        panels, tokens = q.shape[0] // chunks, q.shape[1]
        generator = torch.Generator().manual_seed((1000 * self.seed + step) % 2**63)
        out = torch.empty_like(q)
        for reader, others in enumerate(all_other_panels(panels)):
            draws = [draw_tokens(tokens, self.rate, draw=(self.seed, step, panel)).sampled for panel in others]
            order = torch.randperm(sum(map(len, draws)), generator=generator)
            for row in range(reader, q.shape[0], panels):
                first = row - reader
                given_k, given_v = (
                    torch.cat([tensor[first + panel, draw] for panel, draw in zip(others, draws, strict=True)])
                    for tensor in (k, v)
                )
                keys, values = torch.cat([k[row], given_k]), torch.cat([v[row], given_v[order]])
                out[row] = attention_pytorch(q[row, None], keys[None], values[None], extra_options["n_heads"])[0]
        return out
