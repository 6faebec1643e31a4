"""Patches of the host's attention that wrap what another node has set in the same place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module

from .attention import plain_attention
from .types import AttentionReplacement
from .unet import BlockKey, Place

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class ChainedPatch:
    """An attention replacement around the one that was there before, `previous`; None: the host's own attention.

    The host asks a patch for its weights' device, its models and a cleanup; the one within must go on being asked.
    """

    previous: AttentionReplacement | None = None

    def call_previous(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """Attention as it would be without this patch; the arguments are the host's."""
        return (self.previous or plain_attention)(q, k, v, extra_options)

    def to(self, device_or_dtype: Any) -> Self:
        """Move the patch within, if it can be moved."""
        if self.previous is None or not hasattr(self.previous, "to"):
            return self
        return replace(self, previous=self.previous.to(device_or_dtype))

    def models(self) -> list[Any]:
        """The models of the patch within; our own are the patched model's additional models."""
        if self.previous is None or not hasattr(self.previous, "models"):
            return []
        models: list[Any] = self.previous.models()
        return models

    def cleanup(self) -> None:
        """Pass the host's call on."""
        if self.previous is not None and hasattr(self.previous, "cleanup"):
            self.previous.cleanup()


def chain_of(patch: Any) -> Iterator[Any]:
    """`patch` and what it holds to call, outermost first.

    Our own patches call what they hold `previous`; others' are functions that close over it, have it as a default or
    are partial, or objects with an attribute for it.
    """
    waiting, seen = [patch], set()
    while waiting:
        link = waiting.pop()
        if not callable(link) or isinstance(link, type) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        waiting += _held(link)


def _held(patch: Any) -> Iterator[Any]:
    if isinstance(patch, FunctionType):
        yield from (cell.cell_contents for cell in patch.__closure__ or () if _is_set(cell))
        yield from (patch.__defaults__ or ())
        yield from (patch.__kwdefaults__ or {}).values()
    elif isinstance(patch, MethodType):
        yield patch.__self__
    elif isinstance(patch, partial):
        yield from (patch.func, *patch.args, *patch.keywords.values())
    elif not isinstance(patch, Module):
        yield from getattr(patch, "__dict__", {}).values()


def _is_set(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return False
    return True


def attention_patches(transformer_options: dict[str, Any], kind: str) -> dict[tuple[Any, ...], Any]:
    """The replacements of kind "attn1" or "attn2" that nodes have set: {(block, number[, depth]): patch}."""
    patches: dict[tuple[Any, ...], Any] = transformer_options.get("patches_replace", {}).get(kind, {})
    return patches


def lost_places(
    patches: dict[tuple[Any, ...], Any], places: Iterable[Place], ours: Callable[[Any], bool]
) -> list[Place]:
    """Those of `places` at which the host asks a patch that neither is `ours` nor, as far as can be seen, wraps it.

    The host asks a patch by (block, number, depth) before one by (block, number).
    """

    def asked(place: Place) -> Any:
        return patches.get(place, patches.get(place[:2]))

    return [place for place in places if not any(map(ours, chain_of(asked(place))))]


def owners_of(patches: dict[tuple[Any, ...], Any], block: BlockKey) -> dict[tuple[Any, ...], Any]:
    """Where the host would ask a patch of `block`, and what it would ask there; None: nothing of another node.

    An owner by (block, number, depth) would win over one by (block, number): each is where it is.
    """
    return {block: None, **{place: patch for place, patch in patches.items() if place[:2] == block}}


def replace_attention(
    model: ModelPatcher, kind: str, blocks: Iterable[BlockKey], make: Callable[[BlockKey, Any], ChainedPatch]
) -> None:
    """Set `make(block, owner)` as the patch of kind "attn1" or "attn2" of each block of `model`, a clone.

    `owner` is the patch that another node has set there, None where there is none.
    """
    owned = attention_patches(model.model_options["transformer_options"], kind)
    set_patch = model.set_model_attn1_replace if kind == "attn1" else model.set_model_attn2_replace
    for block in blocks:
        for place, owner in owners_of(owned, block).items():
            set_patch(make(block, owner), *block, place[2] if len(place) == 3 else None)
