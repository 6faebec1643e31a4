"""Draw stories of the toy world through the host's own sampling, with and without Consistent Self-Attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import numpy as np
import torch
from comfy.ldm.modules.attention import attention_pytorch

from ..devtools.toy import model as toy_model
from ..devtools.toy.figure import Kind
from ..devtools.toy.palette import Array
from ..devtools.toy.pixel_vae import ENLARGED
from ..devtools.toy.scenes import SCENES
from ..devtools.toy.world import POSE_NAMES, POSITION_NAMES, random_look, render, stage
from ..devtools.toy.world import Direction as Directed
from ..nodes.attention_nodes import StoryApplyConsistentSelfAttention, share_tokens
from ..nodes.attention_patch import AttentionBlock, SharingSettings, self_attention_blocks
from ..nodes.panel_conditioning import repeat_rows, stack_conditioning
from ..nodes.story_text import Panel, Story
from ._consistency_metrics import PanelPrompt

OTHER_BLOCKS: dict[str, Callable[[AttentionBlock], bool]] = {
    "encoder and middle": lambda block: block.key[0] != "output",
    "decoder, lower level": lambda block: block.key[0] == "output" and block.downsampling == 4,
}
"""Where panels share tokens in rows that the node offers no choice for."""


@dataclass(frozen=True)
class Setting:
    """One row of the table: how the panels of a story are drawn."""

    name: str
    rate: float | None = 0.5
    """Sampling rate; None draws without Consistent Self-Attention."""
    blocks: str = "decoder"
    """A choice of the node, or one of OTHER_BLOCKS."""
    start: float = 0.0
    end: float = 1.0
    shuffled: bool = False
    """Control: the values of the shared tokens are dealt out among their keys anew."""
    same_noise: bool = False
    routed: bool = False
    """Panels share tokens with those of the same character only: the node's `story` input."""
    panels: int = 4


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


class Painter:
    """The toy model, ready to draw stories."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.model, self.clip, self.vae = toy_model.load()
        # The host's default on a CPU saves memory; the result is the same to rounding.
        options = self.model.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda _chosen, *args, **kwargs: attention_pytorch(*args, **kwargs)

    def draw(self, prompts: Sequence[PanelPrompt], setting: Setting, seed: int) -> Array:
        """One story's panels [P, 32, 32, 3], sRGB 0 to 1; `seed` makes the noise and the draw of tokens."""
        story = None
        if setting.routed:
            panels = (Panel(panel.text, caption="", characters=(panel.kind.name,)) for panel in prompts)
            story = Story(tuple(panels), negative="")
        model = self._patched(setting, seed, story)
        positive = stack_conditioning([self._encode(panel.text) for panel in prompts])
        negative = repeat_rows(self._encode(""), len(prompts))
        latents = torch.zeros(len(prompts), 4, 32, 32)
        # As in one batch of a stock sampler: the panels' noises are independent of one another.
        noise = comfy.sample.prepare_noise(latents, seed)
        if setting.same_noise:
            noise = noise[:1].expand_as(noise).clone()
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
            latents,
            disable_pbar=True,
            seed=seed,
        )
        images: Array = self.vae.decode(samples)[:, ENLARGED // 2 :: ENLARGED, ENLARGED // 2 :: ENLARGED].numpy()
        return images

    def _encode(self, text: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def _patched(self, setting: Setting, seed: int, story: Story | None) -> Any:
        if setting.rate is None:
            return self.model
        model = self.model
        if setting.shuffled:
            model = model.clone()
            for block in self_attention_blocks(model.model.diffusion_model):
                model.set_model_attn1_replace(shuffled_values, *block.key)
        if setting.blocks in OTHER_BLOCKS:
            chosen = OTHER_BLOCKS[setting.blocks]
            keys = [block.key for block in self_attention_blocks(model.model.diffusion_model) if chosen(block)]
            model = model.clone()
            share_tokens(model, SharingSettings(setting.rate, seed, float("inf"), 0.0, sources=None), keys)
            return model
        node = StoryApplyConsistentSelfAttention
        return node.execute(
            model=model,
            sampling_rate=setting.rate,
            seed=seed,
            start_percent=setting.start,
            end_percent=setting.end,
            blocks=setting.blocks,
            window=0,
            story=story,
        )[0]


def shuffled_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
    """The attention under the node's: what it adds to a panel's own tokens loses the tie between key and value."""
    own, all_tokens = q.shape[1], k.shape[1]
    order = torch.randperm(all_tokens - own, generator=torch.Generator().manual_seed(all_tokens)) + own
    mixed = torch.cat([v[:, :own], v[:, order.to(v.device)]], dim=1)
    return attention_pytorch(q, k, mixed, extra_options["n_heads"])
