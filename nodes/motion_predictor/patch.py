"""SMP guidance as patches and wrappers of the host's SD1.5 UNet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import comfy.patcher_extension
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.supported_models import SD20
from torch import Tensor

from ...smp.config import CrossAttentionSite, Guidance
from ...smp.injection import AddedKV
from ..host.attention import attention_of_call
from ..host.patches import ChainedPatch, attention_patches, lost_places
from ..host.rows import FRAME, row_indices, rows_per_chunk
from ..host.run_checks import prepare_rows
from ..host.types import LENGTHS_KEY
from ..host.unet import Place, unet_blocks, unet_of
from .cross_attention import concat_attention, count_text_repeats, decoupled_attention, tokens_of_rows
from .loading import LoadedSMP
from .predict import SMPEmbeds

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

AS_TRAINED = "as trained"
KEY = "storydiffusion_smp"
"""Entry of transformer_options: a `CallTokens` for each `SMPGuide` on the model. Also the wrappers' key."""
POSITIVE_KEY = "storydiffusion_smp_positive"
"""Entry of transformer_options during a run: the host's uuids of its positive conditioning."""


@dataclass(frozen=True)
class CallTokens:
    """One model call: motion tokens (B, N, C) of its rows, how often each row's text repeats, and the projections."""

    tokens: Tensor
    text_repeats: list[int] | None
    added_kv: AddedKV


@dataclass(frozen=True, eq=False)
class SMPGuide:
    """One transition on one model. It holds no state of a run: any number of runs can share it."""

    tokens: Tensor
    uncond: Tensor
    added_kv: ModelPatcher
    """The projections; the running model has its own copy on another GPU."""
    guidance: Guidance
    strength: float
    chained: frozenset[tuple[str, int]]
    """UNet blocks whose cross-attention another node had replaced before."""
    places: Sequence[Place] = ()
    """All cross-attentions that are guided."""

    def begin_run(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """OUTER_SAMPLE wrapper: refuse what the guidance would be wrong or lost for, and note what is positive.

        Raises:
            ValueError: a clip of other length, a guider whose first prompt isn't positive, padded prompts in one
                softmax with the motion, a later replacement of cross-attention.
        """
        guider = executor.class_obj
        if "positive" not in guider.conds:
            raise ValueError(
                f"SMP guidance has to know which prompt is the positive one, and the guider of this run "
                f"({type(guider).__name__}) has none of that name, but {', '.join(guider.conds) or 'no prompt'}. Use "
                f"CFGGuider or KSampler."
            )
        if "middle" in guider.conds:
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
        if self.guidance == "concat" and any(
            LENGTHS_KEY in entry for conds in guider.conds.values() for entry in conds
        ):
            raise ValueError(
                "SMP guidance by concat weighs motion against the whole text, and the frames' prompts here are of so "
                "different length that they are padded. Make them more alike, or set guidance to decoupled."
            )
        # The guider's options are this run's own copy: the host makes it, and drops it at the end.
        options = guider.model_options["transformer_options"]
        require_no_later_owner(options, self.chained)
        self._require_all_places(options)
        options[POSITIVE_KEY] = frozenset(entry["uuid"] for entry in guider.conds["positive"])
        return executor(noise, *args, **kwargs)

    def _require_all_places(self, transformer_options: dict[str, Any]) -> None:
        """Refuse later replacements of single cross-attentions, by a node that doesn't ask what was there before."""

        def guided(patch: Any) -> bool:
            return isinstance(patch, SMPCrossAttention) and patch.guide is self

        lost = lost_places(attention_patches(transformer_options, "attn2"), self.places, guided)
        if lost:
            raise ValueError(
                f"A node behind Apply SMP Guidance has replaced {len(lost)} of the model's {len(self.places)} "
                f"cross-attentions (the first in UNet block {lost[0][:2]}), and the motion is lost there. Connect it "
                f"before Apply SMP Guidance."
            )

    def lay_out_tokens(self, executor: Any, *call: Any, **kwargs: Any) -> Tensor:
        """APPLY_MODEL wrapper: find every row's motion tokens once a call instead of once a block."""
        *before, transformer_options = call
        x, _, _, text, _ = before
        frames = rows_per_chunk(x.shape[0], transformer_options)
        indices = row_indices(frames, transformer_options)
        rows = tokens_of_rows(self.tokens, self.uncond, indices, positive_chunks(transformer_options))
        repeats = count_text_repeats(text) if self.guidance == "concat" else None
        tokens = CallTokens(rows.to(x.device), repeats, self._projections(executor.class_obj.current_patcher))
        tokens_of = {**transformer_options.get(KEY, {}), self: tokens}
        return executor(*before, {**transformer_options, KEY: tokens_of}, **kwargs)

    def _projections(self, patcher: ModelPatcher) -> AddedKV:
        """Those of the running model, or, where the host runs a second model with this one's patches, the first's."""
        for added in patcher.get_additional_models_with_key(KEY):
            if added.clone_base_uuid == self.added_kv.clone_base_uuid:
                return added.model
        return self.added_kv.model


@dataclass(frozen=True)
class SMPCrossAttention(ChainedPatch):
    """`attn2_replace` patch of one cross-attention, around what owned it before.

    Over an earlier replacement, concat contributes the difference that P makes to attention to the text:
    added to plain attention that is equation 6, and added to another replacement it leaves that one's part
    whole.
    """

    guide: SMPGuide
    position: int

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
        attend = attention_of_call(extra_options)
        motion = call.added_kv(self.position, call.tokens.to(q.dtype))
        if guide.guidance == "decoupled":
            return decoupled_attention(
                self.call_previous(q, k, v, extra_options), q, motion, attend, strength=guide.strength
            )
        joint = concat_attention(q, (k, v), motion, attend, strength=guide.strength, text_repeats=call.text_repeats)
        if self.previous is None:
            return joint
        return self.previous(q, k, v, extra_options) + (joint - attend(q, k, v, None))


def positive_chunks(transformer_options: Mapping[str, Any]) -> list[bool]:
    """For each chunk of a model call whether it is one of the positive prompt.

    Its place alone doesn't tell: a node that asks for the negative prompt by itself has it in the first place. Nor does
    its uuid: the host gives some negative ones a positive one's.
    """
    positive = transformer_options[POSITIVE_KEY]
    chunks = zip(transformer_options["cond_or_uncond"], transformer_options["uuids"], strict=True)
    return [index == 0 and uuid in positive for index, uuid in chunks]


def require_no_later_owner(transformer_options: dict[str, Any], chained: Collection[tuple[str, int]]) -> None:
    """Refuse replacements of whole blocks' cross-attention by a later node: the host asks ours, of one layer, alone."""
    owners = attention_patches(transformer_options, "attn2")
    # A node that wraps what it finds, as Consistent Self-Attention does, has ours within.
    ours = {key[:2] for key, patch in owners.items() if isinstance(patch, SMPCrossAttention)}
    later = sorted(key for key in owners if len(key) == 2 and key in ours and key not in chained)
    if later:
        raise ValueError(
            f"A node behind Apply SMP Guidance has replaced the model's cross-attention, as IP-Adapter nodes do, and "
            f"would not be heard (UNet block {later[0]}). Connect it before Apply SMP Guidance."
        )


def cross_attention_sites(unet: UNetModel) -> Iterator[CrossAttentionSite]:
    """Every cross-attention of a UNet, with the key under which the host looks up its replacement."""
    for block in unet_blocks(unet):
        for layer in block.transformers:
            for index, transformer in enumerate(layer.transformer_blocks):
                attention = transformer.attn2
                yield CrossAttentionSite(*block.key, index, attention.heads * attention.dim_head)


def require_sites(model: ModelPatcher, smp: LoadedSMP) -> None:
    """ValueError unless the model's cross-attentions are exactly those that the SMP has projections for."""
    config = smp.config
    unet = unet_of(model)
    kind = type(model.model).__name__
    if not isinstance(unet, UNetModel):
        raise ValueError(f"SMP guidance needs an SD1.5 model; this one is a {kind} ({type(unet).__name__}).")
    if isinstance(model.model.model_config, SD20):
        raise ValueError("SMP guidance needs an SD1.5 model; this one is an SD2.")
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
        f"{_checkpoint_advice(smp)} ({smp.summary})"
    )


def _checkpoint_advice(smp: LoadedSMP) -> str:
    if smp.config.predictor is None:
        return "IP-Adapter SD1.5 weights need an SD1.5 checkpoint, not SDXL."
    return "Load the checkpoint that the SMP was trained for, or another SMP."


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
    model: ModelPatcher, smp: LoadedSMP, embeds: SMPEmbeds, pair_index: int, guidance: str, strength: float
) -> ModelPatcher:
    """A clone of `model` whose frame i cross-attends to P_i of one transition, besides its text.

    Args:
        model: the host's ModelPatcher of an SD1.5 UNet.
        smp: the SMP that predicted `embeds`.
        embeds: predicted motion.
        pair_index: the transition, from 0.
        guidance: how P enters, concat or decoupled (see `cross_attention`), or AS_TRAINED.
        strength: weight of P; at 0 the clone is left unpatched.

    Raises:
        ValueError: model, SMP and embeds that don't fit each other.
    """
    require_sites(model, smp)
    require_embeds(smp, embeds, pair_index)
    patched = model.clone()
    if strength == 0:
        return patched
    owners = attention_patches(model.model_options["transformer_options"], "attn2")
    chained = frozenset(key for key in owners if len(key) == 2)
    places = [site.key for site in smp.config.sites]
    chosen = smp.config.guidance if guidance == AS_TRAINED else cast(Guidance, guidance)
    guide = SMPGuide(embeds.tokens[pair_index], embeds.uncond, smp.added_kv, chosen, strength, chained, places)
    for position, site in enumerate(smp.config.sites):
        previous = owners.get(site.key, owners.get((site.block, site.number)))
        patch = SMPCrossAttention(guide, position, previous=previous)
        patched.set_model_attn2_replace(patch, site.block, site.number, site.index)
    wrappers = comfy.patcher_extension.WrappersMP
    for check in (guide.begin_run, prepare_rows(FRAME, "Apply SMP Guidance")):
        patched.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, check)
    patched.add_wrapper_with_key(wrappers.APPLY_MODEL, KEY, guide.lay_out_tokens)
    added = patched.get_additional_models_with_key(KEY)
    if not any(smp.added_kv.is_clone(other) for other in added):
        patched.set_additional_models(KEY, [*added, smp.added_kv])
    return patched
