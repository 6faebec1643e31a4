"""Batches of any shape: pictures, latents and masks for references and characters, windows, clips."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from storydiffusion.nodes.clips.formats import VIDEO_FORMATS
from storydiffusion.nodes.clips.joining import join_clips
from storydiffusion.nodes.clips.nodes import StoryPanelPairs
from storydiffusion.nodes.references.rows import add_reference_rows, require_a_row_each, require_pictures
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.nodes.subjects.given_masks import set_subject_masks
from storydiffusion.nodes.windows.plan import plan_windows
from storydiffusion.tests.helpers.fuzzing import examples, readable

STORY = parse_story("[Bob] walks\n[NC] rain", "[Bob] a man")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
sizes = st.integers(0, 5)


def tensors(shapes: st.SearchStrategy[Any], dtypes: list[torch.dtype] = FLOATS) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of one value, also not a number."""
    values = st.sampled_from([0.0, 1.0, 0.25, -3.0, float("nan"), float("inf")])
    return st.builds(
        lambda shape, value, dtype: torch.full(tuple(shape), value).to(dtype), shapes, values, st.sampled_from(dtypes)
    )


any_shape = st.lists(sizes, max_size=5)
latent_shape = st.tuples(st.sampled_from([2, 2, 2, 1, 3]), st.just(4), st.just(3), st.just(5))
mask_shape = st.tuples(st.sampled_from([1, 2, 2, 3]), sizes, sizes)


@st.composite
def latents(draw: st.DrawFn) -> dict[str, Any]:
    latent: dict[str, Any] = {"samples": draw(tensors(latent_shape | any_shape.filter(len)))}
    if draw(st.booleans()):
        latent["noise_mask"] = draw(tensors(mask_shape | any_shape))
    if draw(st.booleans()):
        latent["batch_index"] = draw(st.lists(st.integers(0, 2**40), min_size=0, max_size=3))
    return latent


@examples(12)
@given(latents(), tensors(st.tuples(st.integers(1, 2), st.just(4), st.just(3), st.just(5)) | any_shape))
def test_rows_of_references(latent: dict[str, Any], references: torch.Tensor) -> None:
    def add() -> dict[str, Any]:
        require_a_row_each(STORY, latent)
        return add_reference_rows(latent, references)

    rows = readable(add, "latent batch", "latent gives", "vae gives", "batch_index", "noise mask")
    if rows is None:
        return
    count = len(references)
    assert torch.equal(rows["samples"][:count].nan_to_num(), references.to(latent["samples"]).nan_to_num())
    assert len(rows["samples"]) == len(rows["noise_mask"]) == len(rows["batch_index"]) == count + 2
    assert not rows["noise_mask"][:count].any()
    assert set(rows["batch_index"][:count]).isdisjoint(rows["batch_index"][count:])


@examples(3)
@given(tensors(any_shape | st.tuples(sizes, sizes, sizes, st.integers(0, 5))))
def test_pictures_of_references(images: torch.Tensor) -> None:
    readable(lambda: require_pictures(images), "images has the shape")


# Masks of three dimensions alone: set_subject_masks takes others for what they aren't.
@examples(8)
@given(
    st.sampled_from(["Bob", "[bob]", "【ＢＯＢ】", "Eve", ""]), tensors(mask_shape, [*FLOATS, torch.bool, torch.uint8])
)
def test_masks_of_a_character(name: str, masks: torch.Tensor) -> None:
    story = readable(lambda: set_subject_masks(STORY, name, masks), "character is", "masks holds")
    if story is not None:
        assert story.panels[0].masks["Bob"].shape == masks.shape[1:]
        assert not story.panels[1].masks


casts = st.lists(st.lists(st.sampled_from(["Bob", "Ann", "Eve", "", "(unnamed)"]), max_size=3), max_size=12)


@examples(8)
@given(casts, st.integers(-2, 6) | st.integers(-(2**70), 2**70))
def test_plans_of_windows(casts: list[list[str]], window: int) -> None:
    plan = readable(lambda: plan_windows(casts, window), f"window is {window}, but panel")
    if plan is None:
        return
    first = {name: next(panel for panel, cast in enumerate(casts) if name in cast) for cast in casts for name in cast}
    assert [panel for part in plan for panel in part.owned] == list(range(len(casts)))
    for part in plan:
        assert list(part.panels) == sorted(set(part.panels))
        assert len(part.panels) <= window
        assert set(part.panels) == {*part.owned, *(first[name] for panel in part.owned for name in casts[panel])}


@examples(5)
@given(st.sampled_from(list(VIDEO_FORMATS)), st.integers(1, 10**9), st.integers(1, 10**9), st.integers(2, 10**9))
def test_legal_clips(video_model: str, width: int, height: int, frames: int) -> None:
    rule = VIDEO_FORMATS[video_model]
    *size, length = rule.legal_clip(width, height, frames)
    for legal, asked in zip(size, (width, height), strict=True):
        assert legal % rule.size_step == 0
        assert legal == rule.size_step or abs(legal - asked) <= rule.size_step / 2
    assert length % rule.frame_step == 1
    assert frames <= length < frames + rule.frame_step


@examples(6)
@given(
    tensors(
        any_shape | st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4)),
        [torch.float32],
    ),
    st.booleans(),
)
def test_panel_pairs(images: torch.Tensor, with_story: bool) -> None:
    story = STORY if with_story else None
    result = readable(lambda: StoryPanelPairs.execute(images, "LTX (32k, 8n+1)", 9, story), "images h")
    if result is not None:
        starts, ends, prompts, width, height, _, count = result.args
        assert len(starts) == len(ends) == len(prompts) == count == len(images) - 1
        assert all(frame.shape[:3] == (1, height, width) for frame in (*starts, *ends))


@examples(6)
@given(st.lists(tensors(any_shape | st.tuples(st.integers(0, 4), st.just(2), st.just(3), st.just(3))), max_size=4))
def test_joined_clips(clips: list[torch.Tensor]) -> None:
    video = readable(lambda: join_clips(clips), "Clip ", "no clips")
    if video is not None:
        assert len(video) == sum(len(clip) for clip in clips) - (len(clips) - 1)
