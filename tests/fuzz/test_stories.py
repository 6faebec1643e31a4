"""Any text as a story, a sheet, references, rates, a name or captions: a result, or an error that says where."""

from __future__ import annotations

import re
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from storydiffusion.nodes.consistent_attention.level_rates import parse_level_rates
from storydiffusion.nodes.pages.layout import contact_sheet
from storydiffusion.nodes.references.panels import add_reference_panels, read_references
from storydiffusion.nodes.story.model import Panel, Story
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.nodes.story.sentences import SPLIT_MODES, split_sentences
from storydiffusion.nodes.story.styles import STYLES
from storydiffusion.nodes.story.tags import parse_characters
from storydiffusion.tests.helpers.fuzzing import examples, readable

WHERE = ("Story, line", "The story is empty", "Characters, line", "The characters field")
SHEETS = [
    "",
    "[Bob] a man",
    "[Bob] a man, with a cap\n[小明]：一个男孩。",
    "[Bob] a\n[bob] b",
    "Bob",
    "[]",
    "[NC] x",
    "[Bob",
]

# Half of a surrogate pair is left out: the sentence splitter takes UTF-8 alone, and says so in words of its own.
anything = st.characters(exclude_categories=["Cs"])
fragments = st.one_of(
    st.sampled_from(
        ["[Bob]", "[Alice]", "【小明】", "［ｂｏｂ］", "[NC]", "[ bob ]", "[]", "[", "]", "\\[", "\\]", "\\"]
    ),
    st.sampled_from(["#", "＃", "\\#", "#a caption", "# [x]", "([Bob]:1.2)", "[Bob]'s", "{prompt}", "{a|b}", "%s"]),
    st.sampled_from(
        ["- ", "* ", "1. ", "1) ", "•\t", "\n", "\n\n", "\r\n", "\r", "\u2028", "\x85", "\x1c", "\ufeff", "\u3000"]
    ),
    st.sampled_from(
        [" walks. ", "Mr. Fox runs! ", '"No," she said. ', "「走れ！」と言った。", "她说：“好。”", "달린다. ", "a", " "]
    ),
    st.text(anything, max_size=12),
)
tags = st.sampled_from(["[Bob]", "[Bob] ", "【Ann】", "[小明]：", "[NC]", "[ bob ] a", ""])
quotations = st.sampled_from(
    [
        "「走れ！」",
        "と言った。",
        "“好。”",
        "他说。",
        '"No!" ',
        "she said. ",
        " ",
        "“가자!”",
        "고 했다.",
        "Dr. A. ",
        "。",
    ]
)
stories = st.lists(fragments, max_size=25).map("".join)


@examples(24)
@given(stories, st.sampled_from(SHEETS), st.sampled_from(SPLIT_MODES), st.sampled_from(list(STYLES)))
def test_story_text(text: str, sheet: str, split_by: str, style: str) -> None:
    story = readable(lambda: parse_story(text, sheet, split_by=split_by, style=style), *WHERE)
    if story is None:
        return
    lines = [line for line in text.removeprefix("\ufeff").splitlines() if line.strip()]
    assert split_by != "line" or len(story.panels) == len(lines)
    before, after = STYLES[style].template.split("{prompt}")
    for panel in story.panels:
        assert panel.prompt.startswith(before)
        assert panel.prompt.endswith(after)
        words = panel.prompt[len(before) : len(panel.prompt) - len(after)]
        # [NC] counts as the words of its panel, whose prompt can then be a dash alone.
        assert any(letter.isalnum() for letter in words) or not panel.characters
        assert set(panel.subjects) <= set(panel.characters)
        assert all(phrase in words for phrase in panel.subjects.values())
    assert story == parse_story(text, sheet, split_by=split_by, style=style)


# Left out at this size, since they take longer: many tags in one line, many lines, many sentences.
@pytest.mark.slow
@examples(4)
@given(
    st.sampled_from(["a ", "é", "字", " ", "\\", "#", "[", "(a:1.2) ", "\U0001f600", "\u0301"]),
    st.sampled_from([10_000, 1_000_000]),
    st.sampled_from(["line", "paragraph"]),
)
def test_story_of_a_megabyte(unit: str, size: int, split_by: str) -> None:
    count = size // len(unit.encode())
    story = readable(lambda: parse_story("x " + unit * count, split_by=split_by), *WHERE)
    assert story is None or len(story.panels) == 1


@examples(12)
@given(st.lists(quotations, max_size=8).map("".join) | stories)
def test_sentences_lose_nothing(text: str) -> None:
    assert "".join(split_sentences(text)) == text


def key(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


@examples(12)
@given(st.lists(st.builds("{}{}{}".format, tags, fragments, fragments), min_size=1, max_size=3).map("\n".join))
def test_character_sheet(text: str) -> None:
    sheet = readable(lambda: parse_characters(text), "Characters, line")
    if sheet is None:
        return
    assert len(sheet) == sum(bool(line.strip()) for line in text.removeprefix("\ufeff").splitlines())
    assert len({key(name) for name in sheet}) == len(sheet)
    assert all(any(letter.isalnum() for letter in description) for description in sheet.values())


levels = st.sampled_from(["1", " 2 ", "٤", "3", "²", ""])
numbers = st.sampled_from(["1", "0.5", ".25", "１", "1.5", "2", "nan", "-0", "1.", "9" * 400])
pairs = st.builds("{}:{}".format, levels, numbers) | st.text(anything, max_size=4)


# Numbers of thousands of digits are left out: Python's own limit for them has words of its own.
@examples(14)
@given(st.lists(pairs, min_size=1, max_size=2).map(",".join))
def test_level_rates(text: str) -> None:
    rates = readable(lambda: parse_level_rates(text, {1, 2, 4}), "level_rates")
    if rates is not None:
        assert set(rates) <= {1, 2, 4}
        assert all(0 <= rate <= 1 for rate in rates.values())
        assert rates == parse_level_rates(", ".join(f"{level}: {rate:f}" for level, rate in rates.items()), {1, 2, 4})


STORY = parse_story("[Bob] walks\n[NC] rain\n[Alice] sings", "[Bob] a man\n[Alice] a girl")
weights = st.floats(allow_subnormal=False) | st.floats(0.1, 16)


@examples(10)
@given(
    st.lists(fragments | st.just("[Bob] stands\n"), max_size=8).map("".join),
    st.sampled_from(SHEETS),
    weights,
    st.integers(0, 3),
)
def test_lines_of_references(text: str, sheet: str, weight: float, pictures: int) -> None:
    names = ("References, line", "references", "Characters, line", "The characters field", "weight is")
    described = readable(lambda: read_references(text, sheet, pictures, weight), *names)
    if described is None:
        return
    assert len(described.panels) == pictures
    assert all(panel.is_reference and panel.weight == weight for panel in described.panels)
    story = readable(lambda: add_reference_panels(STORY, described), "No panel of the story would look at picture")
    assert story is None or story.panels[pictures:] == STORY.panels


captions = st.text(anything, max_size=40) | st.lists(fragments, max_size=4).map("".join)


@examples(10)
@given(
    st.lists(captions, min_size=1, max_size=4),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 3, 3, 1, 4])),
    st.integers(0, 1),
    st.integers(-1, 70),
    st.sampled_from([torch.float32, torch.float16, torch.float64, torch.bfloat16]),
)
def test_captions_of_a_page(
    captions: list[str], size: tuple[int, int, int], more: int, columns: int, dtype: torch.dtype
) -> None:
    images = torch.rand(len(captions) + more, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    page = readable(lambda: contact_sheet(images, captions, columns, font_folders=[]), "images", "columns is")
    assert (page is None) == (more > 0 or size[2] == 1 or columns < 0)
    if page is not None:
        height, width = size[:2]
        assert page[0].shape[0] == 1
        assert page[0].shape[1] > height
        gap = max(4, width // 32)
        assert torch.equal(page[0][0, gap : gap + height, gap : gap + width], images[0, ..., :3].float())


@examples(3)
@given(st.text(anything, max_size=8) | st.sampled_from(["Bob", "【ｂｏｂ】", "[ALICE]", "Alice "]))
def test_name_of_a_character(name: str) -> None:
    known = Story((Panel("a", "a", ("Bob", "Alice")),), "")
    found = known.own_name(re.sub(r"[\[\]【】［］]", "", name))
    assert found is None or key(" ".join(re.sub(r"[\[\]【】［］]", "", name).split())) == key(found)
