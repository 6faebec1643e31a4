"""SMP guidance as patches and wrappers of the host's SD1.5 UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import comfy.ldm.modules.attention
import comfy.patcher_extension
from comfy.ldm.modules.diffusionmodules import openaimodel
from torch import Tensor

from ..smp.config import CrossAttentionSite, Guidance, SMPModelConfig
from ..smp.injection import AddedKV
from .frame_indices import frame_indices, frames_per_call
from .smp_guidance import (
    Attention,
    concat_attention,
    count_text_repeats,
    decoupled_attention,
    tokens_of_rows,
)
from .smp_models import LoadedSMP, SMPEmbeds

KEY = "storydiffusion_smp"
"""Entry of transformer_options: a `CallTokens` for each `SMPGuide` on the model. Also the wrappers' key."""

Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class CallTokens:
    """One model call: motion tokens (B, N, C) of its rows, and how often each row's text repeats."""

    tokens: Tensor
    text_repeats: list[int] | None


@dataclass(frozen=True, eq=False)
class SMPGuide:
    """One transition on one model. It holds no state of a run: any number of runs can share it."""

    tokens: Tensor
    uncond: Tensor
    added_kv: AddedKV
    guidance: Guidance
    strength: float

    def require_frames(self, executor: Callable[..., Tensor], noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """OUTER_SAMPLE wrapper: refuse a clip of other length, and a guider whose first prompt isn't positive.

        Raises:
            ValueError: either of them.
        """
        if "middle" in executor.class_obj.conds:  # type: ignore[attr-defined]
            raise ValueError(
                "SMP guidance does not work with DualCFGGuider, which hands the model its negative prompt first: "
                "use CFGGuider or KSampler."
            )
        frames, batch = self.tokens.shape[0], noise.shape[0]
        if batch != frames:
            raise ValueError(
                f"The latent batch has {batch} frames, but smp_embeds holds {frames} for this transition. "
                f"Set the batch size of the latent to {frames}, or frames of Semantic Motion Predictor to "
                f"{batch}."
            )
        return executor(noise, *args, **kwargs)

    def lay_out_tokens(
        self,
        executor: Callable[..., Tensor],
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Any,
        control: Any,
        transformer_options: dict[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        """DIFFUSION_MODEL wrapper: find every row's motion tokens once a call instead of once a block."""
        frames = frames_per_call(x.shape[0], transformer_options)
        indices = frame_indices(frames, transformer_options)
        rows = tokens_of_rows(self.tokens, self.uncond, indices, transformer_options["cond_or_uncond"])
        tokens = rows.to(context)
        call = CallTokens(tokens, count_text_repeats(context) if self.guidance == "concat" else None)
        calls = {**transformer_options.get(KEY, {}), self: call}
        return executor(x, timesteps, context, y, control, {**transformer_options, KEY: calls}, **kwargs)


@dataclass(frozen=True)
class SMPCrossAttention:
    """`attn2_replace` patch of one cross-attention, around what owned it before.

    Over an earlier replacement, concat contributes the difference that P makes to attention to the text:
    added to plain attention that is equation 6, and added to another replacement it leaves that one's part
    whole.
    """

    guide: SMPGuide
    position: int
    previous: Replacement | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """q (B, Q, C), k and v (B, T, C), projected; returns (B, Q, C), before `to_out`."""
        guide = self.guide
        call: CallTokens = extra_options[KEY][guide]
        if q.shape[0] != call.tokens.shape[0]:
            raise ValueError(
                f"SMP guidance has motion tokens for {call.tokens.shape[0]} rows, but UNet block "
                f"{extra_options['block']} was handed {q.shape[0]}. Another node on this model tiles the "
                "batch; remove it."
            )
        attend = host_attention(extra_options)
        motion = guide.added_kv(self.position, call.tokens.to(q.dtype))
        if guide.guidance == "decoupled":
            base = self.previous(q, k, v, extra_options) if self.previous else attend(q, k, v, None)
            return decoupled_attention(base, q, motion, attend, strength=guide.strength)
        joint = concat_attention(q, (k, v), motion, attend, strength=guide.strength, text_repeats=call.text_repeats)
        if self.previous is None:
            return joint
        return self.previous(q, k, v, extra_options) + (joint - attend(q, k, v, None))

    # The host asks patches for these three; the one underneath must go on being asked.
    def to(self, device_or_dtype: Any) -> SMPCrossAttention:
        """Move the earlier replacement, if it can be moved."""
        if not hasattr(self.previous, "to"):
            return self
        return replace(self, previous=self.previous.to(device_or_dtype))  # type: ignore[union-attr]

    def models(self) -> list[Any]:
        """Models of the earlier replacement; this one's are the patched model's additional models."""
        return self.previous.models() if hasattr(self.previous, "models") else []  # type: ignore[union-attr]

    def cleanup(self) -> None:
        """Pass the host's call on."""
        if hasattr(self.previous, "cleanup"):
            self.previous.cleanup()  # type: ignore[union-attr]


def host_attention(extra_options: dict[str, Any]) -> Attention:
    """The host's attention with the heads, precision and override of the running block."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return comfy.ldm.modules.attention.optimized_attention(
            q,
            k,
            v,
            extra_options["n_heads"],
            mask=mask,
            attn_precision=extra_options["attn_precision"],
            transformer_options=extra_options,
        )

    return attend


def cross_attention_sites(unet: Any) -> Iterator[CrossAttentionSite]:
    """Every cross-attention of a UNet, with the key under which the host looks up its replacement."""
    stages = [("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks)]
    for block, stage in stages:
        for number, layers in enumerate(stage):
            for layer in layers or []:
                if isinstance(layer, comfy.ldm.modules.attention.SpatialTransformer):
                    for index, transformer in enumerate(layer.transformer_blocks):
                        attention = transformer.attn2
                        yield CrossAttentionSite(block, number, index, attention.heads * attention.dim_head)


def require_sites(model: Any, config: SMPModelConfig) -> None:
    """ValueError unless the model's cross-attentions are exactly those that the SMP has projections for."""
    unet = model.model.diffusion_model
    kind = type(model.model).__name__
    if not isinstance(unet, openaimodel.UNetModel):
        raise ValueError(f"SMP guidance needs an SD1.5 model; this one is a {kind} ({type(unet).__name__}).")
    found = {site.key: site.channels for site in cross_attention_sites(unet)}
    expected = {site.key: site.channels for site in config.sites}
    if found == expected:
        return
    differing = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    first = differing[0]
    raise ValueError(
        f"The SMP's added projections don't fit this model ({kind}): it has {len(found)} cross-attentions, "
        f"the SMP has projections for {len(expected)}. The first to differ is UNet block {first}: "
        f"{found.get(first, 'none')} channels in the model, {expected.get(first, 'none')} in the SMP. "
        "IP-Adapter SD1.5 weights need an SD1.5 checkpoint, not SDXL."
    )


def require_embeds(smp: LoadedSMP, embeds: SMPEmbeds, pair_index: int) -> None:
    """ValueError unless `embeds` came from an SMP of this shape and holds the transition asked for."""
    pairs = embeds.tokens.shape[0]
    if not 0 <= pair_index < pairs:
        raise ValueError(f"pair_index is {pair_index}; smp_embeds holds {pairs} transitions, 0 to {pairs - 1}.")
    expected = (smp.config.token_space, *smp.config.output_shape)
    given = (embeds.token_space, *embeds.tokens.shape[2:])
    if given != expected:
        raise ValueError(
            "smp_embeds were predicted with another SMP: they are {} tokens ({} x {}) and this SMP reads {} "
            "tokens ({} x {}). Connect the same Load SMP to both nodes.".format(*given, *expected)
        )


def apply_smp(
    model: Any, smp: LoadedSMP, embeds: SMPEmbeds, pair_index: int, guidance: Guidance, strength: float
) -> Any:
    """A clone of `model` whose frame i cross-attends to P_i of one transition, besides its text.

    Args:
        model: the host's ModelPatcher of an SD1.5 UNet.
        smp: the SMP that predicted `embeds`.
        embeds: predicted motion.
        pair_index: the transition, from 0.
        guidance: how P enters; see `smp_guidance`.
        strength: weight of P; at 0 the clone is left unpatched.

    Raises:
        ValueError: model, SMP and embeds that don't fit each other.
    """
    require_sites(model, smp.config)
    require_embeds(smp, embeds, pair_index)
    patched = model.clone()
    if strength == 0:
        return patched
    guide = SMPGuide(embeds.tokens[pair_index], embeds.uncond, smp.added_kv.model, guidance, strength)
    owners = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for position, site in enumerate(smp.config.sites):
        previous = owners.get(site.key, owners.get((site.block, site.number)))
        patch = SMPCrossAttention(guide, position, previous)
        patched.set_model_attn2_replace(patch, site.block, site.number, site.index)
    wrappers = comfy.patcher_extension.WrappersMP
    patched.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, guide.require_frames)
    patched.add_wrapper_with_key(wrappers.DIFFUSION_MODEL, KEY, guide.lay_out_tokens)
    added = patched.get_additional_models_with_key(KEY)
    if not any(smp.added_kv.is_clone(other) for other in added):
        patched.set_additional_models(KEY, [*added, smp.added_kv])
    return patched
