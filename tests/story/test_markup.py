"""Prompt syntax in stories: embeddings reach the host's tokenizers whole, and captions are free of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd1_clip
import comfy.sdxl_clip
import pytest
import safetensors.torch
import torch
from storydiffusion.nodes.story.markup import as_caption, embedding_names, separate_embeddings
from storydiffusion.nodes.story.parser import parse_story

VECTORS = 3


@pytest.fixture(scope="module", params=["SD1.5", "SDXL"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The host's tokenizer with one embedding, alice_ti, of three vectors for each of its text encoders."""
    folder: Path = tmp_path_factory.mktemp("embeddings")
    if request.param == "SD1.5":
        weights = {"emb_params": torch.randn(VECTORS, 768)}
        made = comfy.sd1_clip.SD1Tokenizer(embedding_directory=str(folder))
    else:
        weights = {"clip_l": torch.randn(VECTORS, 768), "clip_g": torch.randn(VECTORS, 1280)}
        made = comfy.sdxl_clip.SDXLTokenizer(embedding_directory=str(folder))
    safetensors.torch.save_file(weights, folder / "alice_ti.safetensors")
    return made


def vectors(tokenizer: Any, prompt: str) -> set[int]:
    """How many embedding vectors each text encoder gets."""
    encoders = tokenizer.tokenize_with_weights(prompt).values()
    return {sum(isinstance(pair[0], torch.Tensor) for chunk in chunks for pair in chunk) for chunks in encoders}


@pytest.mark.parametrize(
    "description", ["embedding:alice_ti", "a girl, embedding:alice_ti", "a girl embedding:alice_ti."]
)
@pytest.mark.parametrize(
    "story",
    [
        "[Bob] sees [Alice]. Both smile",
        *(f"[Bob] sees [Alice]{mark} Both smile" for mark in "!?;:,…"),
        *(f"[Bob] sees {left}[Alice]{right} smile" for left, right in ('""', "''", "“”", "‘’", "«»", "„“", "()")),
        *(f"[Bob]看见[Alice]{mark}他们笑了" for mark in "。，！？；：、"),
        *(f"[Bob]看见{left}[Alice]{right}他们笑了" for left, right in ("「」", "『』", "《》", "“”")),
        "[Bob]看见[Alice]笑了",
        "[Bob]が[Alice]を見る。",
        "[Bob]이 [Alice]를 본다.",
        "[Alice]",
        "[Alice] walks",
        "[Alice] and [Bob] walk",
        "([Alice]:1.2) walks",
        "[Bob] hugs ([Alice]:1.3).",
        "[Bob] sees [Alice]",
        "[Alice][Bob] dance",
    ],
)
def test_an_embedding_reaches_the_tokenizer_whole(tokenizer: Any, description: str, story: str) -> None:
    line = story if story != "[Alice]" else "[Alice] x"
    (panel,) = parse_story(line, f"[Alice] {description}\n[Bob] a man", split_by="line").panels
    assert vectors(tokenizer, panel.prompt) == {VECTORS}, panel.prompt


def test_a_possessive_of_a_described_character_stays_a_name(tokenizer: Any) -> None:
    (panel,) = parse_story("[Alice]'s dog barks", "[Alice] embedding:alice_ti", split_by="line").panels
    assert panel.prompt == "embedding:alice_ti, Alice's dog barks"
    assert vectors(tokenizer, panel.prompt) == {VECTORS}


@pytest.mark.parametrize(
    ("prompt", "separated"),
    [
        ("embedding:x. A", "embedding:x . A"),
        ("embedding:x, a", "embedding:x, a"),
        ("embedding:x,", "embedding:x,"),
        ("(embedding:x:1.2) a", "(embedding:x:1.2) a"),
        ("a \u201cembedding:x\u201d b", "a \u201c embedding:x \u201d b"),
        ("embedding:my-file.v2 a", "embedding:my-file.v2 a"),
        ("sub/embedding:x", "sub/embedding:x"),
        ("no such word", "no such word"),
    ],
)
def test_what_touches_an_embedding_is_set_apart(prompt: str, separated: str) -> None:
    assert separate_embeddings(prompt) == separated
    assert separate_embeddings(separated) == separated


def test_the_names_of_embeddings() -> None:
    assert embedding_names("embedding:a, (embedding:b:1.2) c embedding:d.v2 xembedding:e") == ["a", "b", "d.v2"]


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("(a red:1.3) hat", "a red hat"),
        ("((fog)) over (the (dark:0.8) sea:1.2)", "fog over the dark sea"),
        ("a man (laughing) walks", "a man (laughing) walks"),
        (r"a clock \(broken\)", "a clock (broken)"),
        ("at (10:30) they meet", "at 10 they meet"),
        ("he wears embedding:hat, and runs", "he wears, and runs"),
        ("embedding:x, a man", "a man"),
        ("<lora:pixel:0.8> a man", "a man"),
        ("Bonjour ! dit-il", "Bonjour ! dit-il"),
        ("(" * 50 + "a" + ":1.1)" * 50, "a"),
    ],
)
def test_captions_carry_no_prompt_syntax(text: str, caption: str) -> None:
    assert as_caption(text) == caption


@pytest.mark.parametrize(
    ("line", "prompt", "caption"),
    [
        ("a [red:blue:0.5] hat", "a [red:blue:0.5] hat", "a blue hat"),
        ("a [cow|horse] runs", "a [cow|horse] runs", "a cow runs"),
        ("[[fog]] on the lake", "[[fog]] on the lake", "fog on the lake"),
        ("[[[fog]]] and [fog::0.5]", "[[[fog]]] and [fog::0.5]", "fog and fog"),
    ],
)
def test_bracket_syntax_names_nobody_where_nobody_is_described(line: str, prompt: str, caption: str) -> None:
    (panel,) = parse_story(line, split_by="line").panels
    assert (panel.prompt, panel.caption, panel.characters) == (prompt, caption, ("(unnamed)",))


def test_bracket_syntax_beside_a_tag() -> None:
    (panel,) = parse_story("[Bob] in [[fog]] wears a [red:blue:0.5] hat", split_by="line").panels
    assert panel.characters == ("Bob",)
    assert panel.prompt == "Bob in [[fog]] wears a [red:blue:0.5] hat"


def test_with_a_sheet_every_bracket_is_a_name() -> None:
    with pytest.raises(ValueError, match=r"\[red:blue:0.5\] is not in the characters field"):
        parse_story("[Bob] wears a [red:blue:0.5] hat", "[Bob] a man")
