"""Patches around patches: what is within goes on being moved, loaded and cleaned up, and is found where it is held."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from storydiffusion.nodes.consistent_attention.patch import ConsistentSelfAttentionPatch
from storydiffusion.nodes.consistent_attention.settings import SharingSettings
from storydiffusion.nodes.host.patches import ChainedPatch, chain_of, lost_places
from storydiffusion.nodes.motion_predictor.patch import SMPCrossAttention, SMPGuide
from storydiffusion.nodes.subjects.reader import CrossAttentionReader

SETTINGS = SharingSettings(sampling_rate=0.5, seed=0, sources=None)
GUIDE = SMPGuide(torch.zeros(1, 1, 1), torch.zeros(1, 1), None, "concat", 1.0, frozenset())
MAKE: dict[str, Callable[[Any], ChainedPatch]] = {
    "sharing": lambda owner: ConsistentSelfAttentionPatch(SETTINGS, 0.5, previous=owner),
    "reader": lambda owner: CrossAttentionReader(previous=owner),
    "motion": lambda owner: SMPCrossAttention(GUIDE, 0, previous=owner),
}


class Weighty:
    """Another node's patch, with weights of its own."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.cleaned = 0

    def __call__(self, q: Any, k: Any, v: Any, extra_options: Any) -> Any:
        return q

    def to(self, device_or_dtype: Any) -> Weighty:
        return Weighty(str(device_or_dtype))

    def models(self) -> list[str]:
        return ["its model"]

    def cleanup(self) -> None:
        self.cleaned += 1


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_what_the_host_asks_reaches_the_patch_within(make: Callable[[Any], ChainedPatch]) -> None:
    inner = Weighty()
    patch = make(inner)
    moved = patch.to("meta")
    assert isinstance(moved, type(patch))
    assert moved.previous.device == "meta"
    assert patch.previous is inner
    assert inner.device == "cpu"
    assert patch.models() == ["its model"]
    patch.cleanup()
    assert inner.cleaned == 1


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("owner", [None, lambda q, k, v, options: q], ids=["nothing", "a function"])
def test_what_cannot_be_asked_is_left_alone(make: Callable[[Any], ChainedPatch], owner: Any) -> None:
    patch = make(owner)
    assert patch.to("meta") is patch
    assert patch.models() == []
    patch.cleanup()


def closing_over(patch: Any) -> Any:
    return lambda *call: patch(*call)


def by_default(patch: Any) -> Any:
    def call(q: Any, k: Any, v: Any, options: Any, inner: Any = patch) -> Any:
        return inner(q, k, v, options)

    return call


class Holding:
    def __init__(self, patch: Any) -> None:
        self.old = patch

    def __call__(self, *call: Any) -> Any:
        return self.old(*call)

    def method(self, *call: Any) -> Any:
        return self.old(*call)


HELD: dict[str, Callable[[Any], Any]] = {
    "itself": lambda patch: patch,
    "closure": closing_over,
    "default": by_default,
    "partial": lambda patch: functools.partial(lambda inner, *call: inner(*call), patch),
    "object": Holding,
    "bound method": lambda patch: Holding(patch).method,
    "twice": lambda patch: closing_over(Holding(closing_over(patch))),
    "ours": lambda patch: CrossAttentionReader(previous=patch),
}


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
def test_a_patch_is_found_wherever_another_holds_it(hold: Callable[[Any], Any]) -> None:
    ours = Weighty()
    assert any(link is ours for link in chain_of(hold(ours)))
    assert not any(link is ours for link in chain_of(hold(Weighty())))


def test_a_patch_that_holds_itself_ends() -> None:
    circle = Holding(None)
    circle.old = circle
    assert list(chain_of(circle)) == [circle]


def test_the_host_asks_for_one_depth_before_it_asks_for_the_block() -> None:
    ours, other = Weighty(), Weighty()
    places = [("output", 1, 0), ("output", 1, 1), ("output", 2, 0), ("middle", 0, 0)]
    patches = {("output", 1): ours, ("output", 1, 1): other, ("output", 2, 0): ours, ("output", 2): other}
    assert lost_places(patches, places, lambda link: link is ours) == [("output", 1, 1), ("middle", 0, 0)]
