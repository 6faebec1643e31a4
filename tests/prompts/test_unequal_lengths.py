"""Prompts of very different length in one batch: each panel as its prompt alone draws it, at the longest one's cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.ldm.modules.attention as host_attention
import comfy.sample
import nodes
import pytest
import torch
from storydiffusion.devtools.tiny.controlnet import TINY_SD15_CONTROL, ensure_controlnet
from storydiffusion.nodes.host import text_rows
from storydiffusion.nodes.host.text_rows import repeat_rows_to_one_length
from storydiffusion.nodes.host.types import LENGTHS_KEY
from storydiffusion.nodes.prompts.nodes import StoryEncodePrompts
from storydiffusion.nodes.story.model import Panel, Story
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.nodes.transition_video.conditioning import conditioning_of_pair
from storydiffusion.tests.helpers.sharing import share

CHUNK = 77
CHUNKS = (3, 4, 5, 7)


def prompt_of(chunks: int) -> str:
    return f"a cat {chunks} " + "very " * (75 * chunks - 20)


def story(*chunks: int) -> Story:
    return Story(tuple(Panel(prompt_of(count), "", ("Cat",)) for count in chunks), "blurry")


def encode(clip: Any, told: Story) -> Any:
    return StoryEncodePrompts.execute(clip, told).result


@pytest.fixture(scope="module")
def encoded(tiny_sd15: tuple[Any, Any, Any]) -> Any:
    return encode(tiny_sd15[1], story(*CHUNKS))


@pytest.fixture(scope="module")
def control(models: Path) -> Any:
    return comfy.controlnet.load_controlnet(str(ensure_controlnet(TINY_SD15_CONTROL, models / "controlnet")))


def draw(model: Any, positive: Any, negative: Any, *, rows: slice = slice(None), steps: int = 1) -> torch.Tensor:
    noise = torch.randn(len(CHUNKS), 4, 8, 8, generator=torch.Generator().manual_seed(3))[rows]
    return comfy.sample.sample(
        *(model, noise, steps, 5.0, "euler", "normal", positive, negative, torch.zeros_like(noise)), disable_pbar=True
    )


def keys_per_row(model: Any) -> tuple[Any, list[int]]:
    """A clone of the model that notes how many keys each row of its cross-attention has."""
    seen: list[int] = []

    def noting(function: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if k.shape[1] % CHUNK == 0:
            seen.extend([k.shape[1]] * k.shape[0])
        return function(q, k, *rest, **options)

    watched = model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = noting
    return watched, seen


@pytest.mark.slow
def test_each_panel_is_what_its_prompt_alone_draws(tiny_sd15: tuple[Any, Any, Any], encoded: Any) -> None:
    model, clip, _ = tiny_sd15
    together = draw(model, *encoded, steps=2)
    for row, chunks in enumerate(CHUNKS):
        alone = draw(model, *encode(clip, story(chunks)), rows=slice(row, row + 1), steps=2)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together[0], together[1], atol=1e-1)


def test_no_row_has_more_keys_than_the_longest_prompt(tiny_sd15: tuple[Any, Any, Any], encoded: Any) -> None:
    watched, seen = keys_per_row(tiny_sd15[0])
    draw(watched, *encoded)
    assert max(seen) <= 2 * max(CHUNKS) * CHUNK
    assert {chunks * CHUNK for chunks in CHUNKS} <= set(seen)


def test_lengths_that_repetition_makes_equal_stay_as_they_were(tiny_sd15: tuple[Any, Any, Any]) -> None:
    for chunks in ((1, 1), (1, 2), (2, 3), (1, 2, 4)):
        ((states, options),), _ = encode(tiny_sd15[1], story(*chunks))
        assert LENGTHS_KEY not in options
        assert "hooks" not in options
        rows = [encode(tiny_sd15[1], story(count))[0][0][0] for count in chunks]
        assert torch.equal(states, repeat_rows_to_one_length(rows))


@pytest.mark.slow
def test_a_patch_that_was_there_before_still_adds_its_part(tiny_sd15: tuple[Any, Any, Any], encoded: Any) -> None:
    """As IP-Adapter's decoupled attention adds to that of the text."""
    model, clip, _ = tiny_sd15

    def image_prompt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        text = host_attention.optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra)
        return text + 0.1 * q

    owned = model.clone()
    for place in (("input", 1), ("output", 1), ("output", 2, 0)):
        owned.set_model_attn2_replace(image_prompt, *place)
    together = draw(owned, *encoded)
    for row, chunks in enumerate(CHUNKS):
        alone = draw(owned, *encode(clip, story(chunks)), rows=slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together, draw(model, *encoded), atol=1e-2)


@pytest.mark.slow
def test_where_characters_stand_is_found_beside_padding_as_beside_repetition(
    tiny_sd15: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clip, _ = tiny_sd15
    three, four = "very " * (75 * 3 - 40), "very " * (75 * 4 - 40)
    told = parse_story(
        f"[Bob] meets [Ann] {three}\n[Bob] walks {four}\n[Ann] sleeps\n[Bob] sings",
        "[Bob] a man\n[Ann] a woman",
        split_by="line",
    )
    padded = encode(clip, told)
    assert padded[0][0][1][LENGTHS_KEY] == [3 * CHUNK, 4 * CHUNK, CHUNK, CHUNK]
    monkeypatch.setattr(text_rows, "MOST_REPEATED", 3)
    repeated = encode(clip, told)
    assert repeated[0][0][0].shape[1] == 12 * CHUNK
    drawn = draw(share(model, story=told), *padded, steps=2)
    torch.testing.assert_close(drawn, draw(share(model, story=told), *repeated, steps=2), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(drawn, draw(model, *padded, steps=2), atol=1e-2)


def test_conditioning_concat_is_refused_and_told_what_to_do(tiny_sd15: tuple[Any, Any, Any], encoded: Any) -> None:
    (joined,) = nodes.ConditioningConcat().concat(encoded[0], encoded[1])
    with pytest.raises(ValueError, match=r"\(231, 308, 385, 539 tokens\).*Use prefix and suffix"):
        draw(tiny_sd15[0], joined, encoded[1])


def test_another_number_of_rows_is_refused(tiny_sd15: tuple[Any, Any, Any], encoded: Any) -> None:
    with pytest.raises(ValueError, match="There are 4 of them, but the latent batch has 2 rows"):
        draw(tiny_sd15[0], *encoded, rows=slice(2))


def controlled(conditioning: Any, control: Any) -> Any:
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    return nodes.ControlNetApplyAdvanced().apply_controlnet(*conditioning, control, hint, 1.0, 0.0, 1.0)


@pytest.mark.slow
def test_a_controlnet_sees_each_panels_own_text(tiny_sd15: tuple[Any, Any, Any], control: Any) -> None:
    model, clip, _ = tiny_sd15
    chunks = (3, 4, 1, 1)
    conditioning = encode(clip, story(*chunks))
    assert LENGTHS_KEY in conditioning[0][0][1]
    together = draw(model, *controlled(conditioning, control))
    for row, count in enumerate(chunks[:3]):
        alone = draw(model, *controlled(encode(clip, story(count)), control), rows=slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together, draw(model, *conditioning), atol=1e-2)


def test_a_text_too_long_for_a_controlnet_is_refused(
    tiny_sd15: tuple[Any, Any, Any], encoded: Any, control: Any
) -> None:
    with pytest.raises(ValueError, match="A ControlNet can't be used with that"):
        draw(tiny_sd15[0], *controlled(encoded, control))


def test_a_run_after_one_with_padding_knows_nothing_of_it(tiny_sd15: tuple[Any, Any, Any], encoded: Any) -> None:
    model, clip, _ = tiny_sd15
    plain = encode(clip, story(1, 1, 1, 1))
    before = draw(model, *plain)
    draw(model, *encoded)
    assert torch.equal(draw(model, *plain), before)
    assert LENGTHS_KEY not in model.model_options["transformer_options"]
    assert not model.model_options["transformer_options"].get("patches_replace")


def test_a_transition_is_made_of_its_own_two_texts(tiny_sd15: tuple[Any, Any, Any], encoded: Any) -> None:
    clip, frames, pairs = tiny_sd15[1], 3, len(CHUNKS) - 1
    for pair in range(pairs):
        repeated = repeat_rows_to_one_length(
            [encode(clip, story(chunks))[0][0][0] for chunks in CHUNKS[pair : pair + 2]]
        )
        ((states, options),) = conditioning_of_pair(encoded[0], "positive", pair, pairs, frames)
        assert LENGTHS_KEY not in options
        assert "hooks" not in options
        assert torch.equal(states, torch.stack([torch.lerp(*repeated, weight) for weight in (0.0, 0.5, 1.0)]))
        assert options["pooled_output"].shape[0] == frames
