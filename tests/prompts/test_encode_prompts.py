"""Encode Story Prompts: panel i of a batch is driven by prompt i, and by it alone."""

from pathlib import Path
from typing import Any

import comfy.sample
import pytest
import safetensors.torch
import torch
from storydiffusion.nodes.host.text_rows import repeat_rows_to_one_length
from storydiffusion.nodes.prompts.batching import stack_conditioning
from storydiffusion.nodes.prompts.nodes import StoryEncodePrompts
from storydiffusion.nodes.story.model import Panel, Story
from storydiffusion.nodes.story.parser import parse_story

LONG = "a man with a red cap walks " + "slowly and " * 80
PROMPTS = ["a cat sleeps", LONG, "a dog runs in the rain"]


def story(prompts, negative="blurry"):
    return Story(tuple(Panel(prompt, "", ()) for prompt in prompts), negative)


def encode(clip, prompts):
    return StoryEncodePrompts.execute(clip, story(prompts)).result


def sample(model, noise, positive, negative):
    return comfy.sample.sample(
        model,
        noise,
        2,
        5.0,
        "ddim",
        "normal",
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["tiny_sd15", "tiny_sdxl"])
def test_each_panel_of_the_batch_equals_its_single_run(request, checkpoint):
    model, clip, _ = request.getfixturevalue(checkpoint)
    noise = comfy.sample.prepare_noise(torch.zeros(3, 4, 8, 8), 5)
    positive, negative = encode(clip, PROMPTS)
    assert positive[0][0].shape[0] == negative[0][0].shape[0] == 3
    assert positive[0][0].shape[1] > 77  # unequal lengths were padded
    batch = sample(model, noise, positive, negative)
    single_negative = clip.encode_from_tokens_scheduled(clip.tokenize("blurry"))
    for i, prompt in enumerate(PROMPTS):
        single_positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        single = sample(model, noise[i : i + 1], single_positive, single_negative)
        assert ((batch[i] - single[0]).norm() / single.norm()).item() < 1e-4
        other = sample(
            model,
            noise[i : i + 1],
            positive=[
                [
                    positive[0][0][i - 1 : i or None],
                    {**positive[0][1], "pooled_output": positive[0][1]["pooled_output"][i - 1 : i or None]},
                ]
            ],
            negative=single_negative,
        )
        assert ((batch[i] - other[0]).norm() / single.norm()).item() > 1e-2  # the measure tells prompts apart


def test_stack_rows_repeats_to_the_least_common_multiple():
    rows = [torch.randn(1, 2, 4), torch.randn(1, 3, 4)]
    stacked = repeat_rows_to_one_length(rows)
    assert stacked.shape == (2, 6, 4)
    assert torch.equal(stacked[0], rows[0][0].repeat(3, 1))
    assert torch.equal(stacked[1], rows[1][0].repeat(2, 1))


def test_prompts_with_different_options_are_refused():
    row = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="attention_mask"):
        stack_conditioning([[[row, {}]], [[row, {"attention_mask": row}]]])


def test_missing_clip_is_named():
    with pytest.raises(ValueError, match="clip is None"):
        StoryEncodePrompts.execute(None, story(PROMPTS))


def test_a_missing_embedding_is_told(tiny_sd15: tuple[Any, Any, Any]) -> None:
    sheet, negative = "[Bob] a man embedding:bob_ti", "embedding:bad"
    asking = parse_story("[Bob] walks\nsees (embedding:hat_ti:1.2)", sheet, negative=negative)
    output = StoryEncodePrompts.execute(tiny_sd15[1], asking)
    told = output.ui.as_dict()["text"][0]
    assert "embedding:bob_ti (panel 1, panel 2) is no file in models/embeddings" in told
    assert "embedding:hat_ti (panel 2)" in told
    assert "embedding:bad (the negative prompt)" in told


def test_embeddings_that_are_there_are_not_told(
    tiny_sd15: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tiny_sd15[1].clone()
    safetensors.torch.save_file({"emb_params": torch.randn(2, 768)}, tmp_path / "bob_ti.safetensors")
    monkeypatch.setattr(clip.tokenizer.clip_l, "embedding_directory", [str(tmp_path)])
    asking = parse_story("[Bob] walks. He runs", "[Bob] embedding:bob_ti", split_by="line")
    assert StoryEncodePrompts.execute(clip, asking).ui is None


def test_words_around_every_prompt(tiny_sd15: tuple[Any, Any, Any]) -> None:
    clip = tiny_sd15[1]
    around = StoryEncodePrompts.execute(clip, story(["a cat", "a dog,"]), prefix="night, ", suffix=" rain\nfog").result
    written = encode(clip, ["night, a cat, rain fog", "night, a dog, rain fog"])
    for ours, expected in zip(around, written, strict=True):
        assert torch.equal(ours[0][0], expected[0][0])
    assert torch.equal(
        encode(clip, ["a cat"])[0][0][0], StoryEncodePrompts.execute(clip, story(["a cat"])).result[0][0][0]
    )
