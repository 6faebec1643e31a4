"""Lists, headings, invisible characters and long lines: what people and language models put around a story."""

from __future__ import annotations

import unicodedata

import pytest
from storydiffusion.nodes.story.invisible import without_invisible
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.nodes.story.tags import name_key, parse_characters

SHEET = "[Bob] a man\n[Alice] a girl"
STORY = "[Bob] walks in the forest #Morning\n[Bob] sees [Alice]\n\n[NC] rain"
ZERO_WIDTH = ["\u200b", "\u200e", "\u200f", "\ufeff", "\u00ad", "\u2060", "\u202e", "\ufe0f", "\U000e0041", "\u3164"]


@pytest.mark.parametrize(
    "listed",
    [
        "1. {0}\n2. {1}\n\n3. {2}",
        "1) {0}\n2) {1}\n\n3) {2}",
        "(1) {0}\n(2) {1}\n\n(3) {2}",
        "１．{0}\n２．{1}\n\n３．{2}",
        "1、{0}\n2、{1}\n\n3、{2}",
        "- {0}\n- {1}\n\n- {2}",
        "* {0}\n* {1}\n\n* {2}",
        "• {0}\n• {1}\n\n• {2}",
        "Panel 1: {0}\nPanel 2: {1}\n\nPanel 3: {2}",
        "**1. {0}**\n**2.** {1}\n\n- **3.** {2}".replace("- **3.**", "**3.**"),
        "# The walk\n{0}\n{1}\n\n## Rain\n{2}",
        "{0}\n{1}\n\n---\n{2}",
    ],
)
def test_a_list_is_the_story_that_it_lists(listed: str) -> None:
    lines = [line for line in STORY.splitlines() if line]
    assert parse_story(listed.format(*lines), SHEET, split_by="line") == parse_story(STORY, SHEET, split_by="line")


@pytest.mark.parametrize("tag", ["**[Bob]**", "*[Bob]*", "***[Bob]***", "**[Bob]:**"])
def test_emphasis_around_a_tag(tag: str) -> None:
    (panel,) = parse_story(f"{tag} walks", SHEET, split_by="line").panels
    assert (panel.prompt, panel.caption) == ("a man, walks", "walks")
    assert parse_characters(f"- {tag} a man with a hat") == {"Bob": "a man with a hat"}


def test_what_looks_like_a_marker_and_is_none() -> None:
    lines = ["3 dogs run", "1984. A man walks", "2.5 miles on, rain", "-5 degrees", "*sigh*", "Panel beaters work"]
    assert [panel.prompt for panel in parse_story("\n".join(lines), split_by="line").panels] == lines


def test_a_sheet_with_headings_and_dashes() -> None:
    sheet = "## Characters\n1. **[Bob]** — a man\n2. **[Alice]** - a girl"
    assert parse_characters(sheet) == {"Bob": "a man", "Alice": "a girl"}


def test_a_story_of_headings_is_empty() -> None:
    with pytest.raises(ValueError, match="The story is empty"):
        parse_story("# One\n#Two\n＃ Three\n---")


def test_errors_count_all_lines() -> None:
    with pytest.raises(ValueError, match=r"line 4 \('\[Carl\] runs'\)"):
        parse_story("# Title\n\n1. [Bob] walks\n2. [Carl] runs", SHEET)


@pytest.mark.parametrize("mark", ZERO_WIDTH, ids=lambda mark: unicodedata.name(mark, hex(ord(mark))))
def test_invisible_characters_are_as_if_they_were_not_there(mark: str) -> None:
    expected = parse_story(STORY, SHEET, split_by="paragraph")
    everywhere = mark + mark.join(STORY) + mark
    assert parse_story(everywhere, mark.join(SHEET), split_by="paragraph") == expected
    assert parse_story(STORY.replace("\n\n", f"\n{mark}\n"), SHEET, split_by="paragraph") == expected
    assert name_key(mark.join("Bob")) == name_key("Bob")


@pytest.mark.parametrize(
    "word",
    [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # family
        "\u2764\ufe0f",  # red heart
        "می\u200cروم",  # Persian: I go
        "क्\u200dष",  # Devanagari half form
        "葛\U000e0100",  # ideographic variant
    ],
)
def test_what_joins_stays(word: str) -> None:
    assert without_invisible(f"a {word} b") == f"a {word} b"
    assert without_invisible(f"{word}\u200b") == word


def test_joiners_that_join_nothing_go() -> None:
    assert without_invisible("B\u200cob \u200d sees\u200c \U0001f468\u200d walk") == "Bob  sees \U0001f468 walk"


@pytest.mark.parametrize(
    "spellings",
    [
        ["İpek", "ipek", "Ipek", "ıpek", "İPEK", "IPEK", "i̇pek"],
        ["Straße", "STRASSE", "strasse"],
        ["Σίσυφος", "ΣΊΣΥΦΟΣ"],
        ["Ǆemal", "ǆemal", "ǅemal"],
        ["Ａｌｉｃｅ", "alice", "ALICE"],
        ["José", "Jose\u0301", "JOSÉ"],
        ["ﬁona", "Fiona"],
    ],
)
def test_a_name_is_one_in_any_case(spellings: list[str]) -> None:
    for spelling in spellings:
        (panel,) = parse_story(f"[{spelling}] walks", f"[{spellings[0]}] a girl").panels
        assert panel.characters == (spellings[0],)


def test_different_names_stay_different() -> None:
    assert len({name_key(name) for name in ("Ana", "Aña", "Anna", "Ane", "安娜")}) == 5


def test_a_name_without_brackets_is_pointed_out() -> None:
    story = parse_story("[Alice] waits\n[Alice] sees Bob\nBobby runs\n[NC] Bob is gone\n[Bob] runs, Bob falls", SHEET)
    assert story.notices == ("Bob is described, but not tagged in panel 2: write [Bob] for the description to go in.",)
    assert parse_story("[Alice] sees bob", SHEET).notices == ()  # a name such as Will or Rose is a word as well
    cjk = parse_story("[小红]等着\n[小红]看见小明", "[小明] 男孩\n[小红] 女孩")
    assert [notice.split()[0] for notice in cjk.notices] == ["小明"]


@pytest.mark.parametrize(
    ("story", "sheet", "around"),
    [
        ("[Bob] " + "walks " * 40_000 + "[Carl] runs", SHEET, "[Carl]"),
        ("[Bob] " + "walks " * 40_000 + "] runs", SHEET, "]"),
        ("[Bob] " + "walks " * 40_000 + "[] runs", SHEET, "[]"),
        ("[Bob] walks", "[Bob] " + "a man " * 40_000 + "[Al] x", "[Bob]"),
        ("[" + "x" * 200_000 + "] walks", SHEET, "xxx"),
        ("[Carl] walks", "\n".join(f"[Name{number}] a man" for number in range(9000)), "and 8980 more"),
    ],
    ids=["unknown", "bracket", "empty", "sheet", "long name", "many names"],
)
def test_errors_quote_what_is_around_the_fault(story: str, sheet: str, around: str) -> None:
    with pytest.raises(ValueError, match=r"line|describes") as error:
        parse_story(story, sheet)
    assert len(str(error.value)) < 600
    assert around in str(error.value)
