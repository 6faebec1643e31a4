"""Story text to panels: tags, captions, splitting, prompts, and errors that name the line."""

from __future__ import annotations

import re

import pytest
from storydiffusion.nodes.story.model import UNNAMED_CHARACTER, Panel
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.nodes.story.sentences import language_of, split_sentences
from storydiffusion.nodes.story.styles import STYLES
from storydiffusion.nodes.story.tags import parse_characters

SHEET = "[Bob] a man with a red cap\n[Alice] a girl, wearing a blue dress."
BOB, ALICE = "a man with a red cap", "a girl, wearing a blue dress"


def panels(story: str, sheet: str = "", split_by: str = "auto") -> tuple[Panel, ...]:
    return parse_story(story, sheet, split_by=split_by).panels


@pytest.mark.parametrize(
    ("line", "prompt", "caption", "characters"),
    [
        ("[Bob] wake up in the bed #He wakes up", f"{BOB}, wake up in the bed", "He wakes up", ("Bob",)),
        ("[Bob] walks in the forest.", f"{BOB}, walks in the forest", "walks in the forest.", ("Bob",)),
        ("[Bob] walks#", f"{BOB}, walks", "", ("Bob",)),
        ("[Bob] [Alice] dance", f"{BOB}, and {ALICE}, dance", "dance", ("Bob", "Alice")),
        ("[Alice] and [Bob]: dance", f"{ALICE}, and {BOB}, dance", "dance", ("Alice", "Bob")),
        ("[Bob][Bob] walks", f"{BOB}, walks", "walks", ("Bob",)),
        (
            "[Bob] gives [Alice] a flower",
            f"{BOB}, gives {ALICE}, a flower",
            "gives Alice a flower",
            ("Bob", "Alice"),
        ),
        ("A dog barks at [Bob]", f"A dog barks at {BOB}", "A dog barks at Bob", ("Bob",)),
        (
            "A dog sees [Bob] and [Bob] runs",
            f"A dog sees {BOB} and Bob runs",
            "A dog sees Bob and Bob runs",
            ("Bob",),
        ),
        ("[Bob]'s dog barks", f"{BOB}, Bob's dog barks", "Bob's dog barks", ("Bob",)),
        ("([Bob]:1.2) walks", f"({BOB}:1.2) walks", "Bob walks", ("Bob",)),
        ("[NC] the sun sets #Evening", "the sun sets", "Evening", ()),
        ("the sun [nc] sets", "the sun sets", "the sun sets", ()),
        ("[ bob ] walks", f"{BOB}, walks", "walks", ("Bob",)),
        ("［Ｂｏｂ］ walks ＃朝 [x] #1", f"{BOB}, walks", "朝 [x] #1", ("Bob",)),
        (r"[Bob] holds \#5 \[A\] #No. \#5", f"{BOB}, holds #5 [A]", "No. #5", ("Bob",)),
        ("[Bob] wears {a|b} {prompt}", f"{BOB}, wears {{a|b}} {{prompt}}", "wears {a|b} {prompt}", ("Bob",)),
    ],
)
def test_panel_with_sheet(line: str, prompt: str, caption: str, characters: tuple[str, ...]) -> None:
    assert panels(line, SHEET, "line") == (Panel(prompt, caption, characters),)


def test_two_plain_descriptions_need_no_comma_before_and() -> None:
    sheet = "[Bob] a man with a red cap\n[Eve]: a woman with a blue dress"
    assert panels("[Bob] [Eve] walk", sheet)[0].prompt == ("a man with a red cap and a woman with a blue dress, walk")


def test_panels_keep_the_last_named_characters_and_nc_is_for_its_own_panel() -> None:
    story = "A forest\n[Bob] runs\nrests\n[NC] rain\nsleeps\n[Alice] reads\nsmiles\n[Bob] [Alice] talk\nleave"
    assert [panel.characters for panel in panels(story, SHEET)] == [
        *((), ("Bob",), ("Bob",), (), ("Bob",), ("Alice",), ("Alice",), ("Bob", "Alice"), ("Bob", "Alice")),
    ]
    assert panels(story, SHEET)[4].prompt == f"{BOB}, sleeps"


def test_no_limit_on_characters_and_no_twice_rule() -> None:
    names = [f"N{number}" for number in range(12)]
    sheet = "\n".join(f"[{name}] robot number {name[1:]}" for name in names)
    (panel,) = panels("".join(f"[{name}]" for name in names) + " meet", sheet)
    assert panel.characters == tuple(names)
    assert all(f"robot number {number}" in panel.prompt for number in range(12))


def test_without_sheet_names_go_into_the_prompt() -> None:
    story = "[Bob] walks\nHe rests\n[bob] and [Alice] meet\nBob sees [Cara] run"
    assert [(panel.prompt, panel.characters) for panel in panels(story)] == [
        ("Bob walks", ("Bob",)),
        ("Bob, He rests", ("Bob",)),
        ("Bob and Alice meet", ("Bob", "Alice")),
        ("Bob sees Cara run", ("Cara",)),
    ]


def test_untagged_story_has_one_unnamed_character() -> None:
    story = panels("A man wakes up.\n[NC] Rain.\nHe leaves.")
    assert [panel.characters for panel in story] == [(UNNAMED_CHARACTER,), (), (UNNAMED_CHARACTER,)]
    assert story[0] == Panel("A man wakes up", "A man wakes up.", (UNNAMED_CHARACTER,))


def test_untagged_story_with_a_sheet_of_one() -> None:
    assert [panel.prompt for panel in panels("wakes up\n[NC] rain\nleaves", "[Bob] a man")] == [
        *("a man, wakes up", "rain", "a man, leaves"),
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_endings_blank_lines_and_byte_order_mark(ending: str) -> None:
    story = ending.join(["\ufeff[Bob] walks", "", "  \t", "\u3000[Alice] reads  ", ""])
    sheet = ending.join(["\ufeff[Bob] a man", "", "[Alice] a girl"])
    assert [panel.prompt for panel in panels(story, sheet)] == ["a man, walks", "a girl, reads"]


@pytest.mark.parametrize(
    ("split_by", "captions"),
    [
        ("line", ["wakes up. He yawns", "Morning", "sleeps", "runs. Then a dog", "barks"]),
        ("auto", ["wakes up. He yawns", "Morning", "sleeps", "runs. Then a dog", "barks"]),
        ("paragraph", ["Morning", "sleeps Alice runs. Then a dog barks"]),
        ("sentence", ["wakes up.", "Morning", "sleeps", "runs.", "Then a dog barks"]),
    ],
)
def test_split_by(split_by: str, captions: list[str]) -> None:
    story = "[Bob] wakes up. He yawns\nand stretches. #Morning\n\n[Alice] sleeps\n[Alice] runs. Then a dog\nbarks"
    assert [panel.caption for panel in panels(story, split_by=split_by)] == captions


def test_paragraph_joins_its_captions() -> None:
    assert panels("wakes #One\nand eats #Two", split_by="paragraph")[0] == Panel(
        "wakes and eats", "One Two", (UNNAMED_CHARACTER,)
    )


def test_auto_cuts_a_single_line_into_sentences() -> None:
    story = panels("[Bob] meets Dr. Smith. They walk 3.5 km! [Alice] waits. #The end", SHEET)
    assert [(panel.caption, panel.characters) for panel in story] == [
        ("meets Dr. Smith.", ("Bob",)),
        ("They walk 3.5 km!", ("Bob",)),
        ("The end", ("Alice",)),
    ]


@pytest.mark.parametrize(
    ("language", "sentences"),
    [
        ("en", ['"Hello!" he said. ', "Mr. Lee ran 3.5 km... ", "Why? ", "End"]),
        ("en", ["…He waits. ", "He leaves."]),
        ("zh", ["鲍勃说：“你好！最近怎么样？”", "“走吧！”他说。", "真的吗？！", "是的。"]),
        (
            "ja",
            ["ボブは起きた。", "「おはよう。」と言った。", "「待って！」って叫んだ。", "走る！", "本当？"],
        ),
        ("ko", ["밥은 일어났다. ", '"안녕!" 하고 말했다. ', "3.5km를 걸었다."]),
    ],
)
def test_sentences(language: str, sentences: list[str]) -> None:
    text = "".join(sentences)
    assert language_of(text) == language
    assert split_sentences(text) == sentences


def test_chinese_story() -> None:
    story = panels(
        "【鲍勃】醒来。他走了。[鲍勃]给[爱丽丝]一朵花。", "【鲍勃】：戴红帽子的男人\n[爱丽丝] 女孩，穿蓝裙子"
    )
    assert [(panel.prompt, panel.caption) for panel in story] == [
        ("戴红帽子的男人 醒来", "鲍勃醒来。"),
        ("戴红帽子的男人, 他走了", "他走了。"),
        ("戴红帽子的男人 给 女孩，穿蓝裙子，一朵花", "鲍勃给爱丽丝一朵花。"),
    ]


def test_wrapped_lines_join_without_a_space_in_chinese_and_japanese() -> None:
    assert [panel.caption for panel in panels("彼は森\nへ走った。\n笑う。", split_by="sentence")] == [
        *("彼は森へ走った。", "笑う。"),
    ]


def test_korean_and_japanese_particles_stay_with_the_name() -> None:
    assert panels("[밥]은 걷는다")[0] == Panel("밥 은 걷는다", "밥은 걷는다", ("밥",))
    assert panels("【ボブ】が走る", "【ボブ】 赤い帽子の男")[0] == Panel("赤い帽子の男 が走る", "ボブが走る", ("ボブ",))


@pytest.mark.parametrize(
    ("story", "prompt"),
    [
        ("[小明]和[小红]跳舞", "小明 和 小红 跳舞"),
        ("[小明]看见[小红]，小红看见[小明]", "小明 看见 小红，小红看见小明"),  # the first time is enough
        ("看[小明][小红]跳舞", "看 小明 小红 跳舞"),
        ("然后[Bob]走了，[Bob]笑了", "然后 Bob 走了，Bob笑了"),
        ("「[小明]」在3号", "「小明」在3号"),  # marks and digits are words of their own
        ("[밥]과 [앨리스]는 걷는다", "밥 과 앨리스 는 걷는다"),
        ("They see super[Ann] and [小红] dance", "They see superAnn and 小红 dance"),
    ],
)
def test_names_stand_apart_in_cjk_prompts_and_as_written_in_captions(story: str, prompt: str) -> None:
    (panel,) = panels(story, split_by="line")
    assert (panel.prompt, panel.caption) == (prompt, re.sub(r"[\[\]]", "", story))


def test_styles() -> None:
    assert len(STYLES) >= 9
    assert "none" in STYLES
    for name, style in STYLES.items():
        assert style.template.count("{prompt}") == 1
        story = parse_story("[Bob] walks", SHEET, style=name, negative=" blurry,\n")
        assert f"{BOB}, walks" in story.panels[0].prompt
        assert story.panels[0].caption == "walks"
        assert story.negative == ", ".join(part for part in ("blurry", style.negative) if part)
    with pytest.raises(ValueError, match=r"'baroque'.*comic book"):
        parse_story("x", style="baroque")


@pytest.mark.parametrize(
    ("story", "message"),
    [
        ("", "The story is empty"),
        (" \r\n\ufeff\n".replace("\ufeff", "\t"), "The story is empty"),
        ("[Bob] walks\n[Bob]", r"line 2 \('\[Bob\]'\): the panel is empty"),
        ("[Bob] #Morning", r"line 1 .*: the panel is empty"),
        ("[NC] ...", "line 1 .*: the panel is empty"),
        ("[Bob] walks\n[Alice runs", r"line 2 \('\[Alice runs'\): a \[ is not closed"),
        ("Bob] runs", r"line 1 .*: a \] has no \[ before it"),
        ("[[Bob]] runs", r"line 1 .*: a \[ is not closed"),
        ("[Bob] walks\n[] runs", r"line 2 .*: the tag \[\] is empty"),
        ("[Bob] walks\nsees [Carl]", r"line 2 \('sees \[Carl\]'\): \[Carl\] is not .* \[Bob\], \[Alice\]"),
        ("[NC] [Bob] walks", r"line 1 .*: \[NC\] says"),
        ("walks\nruns", r"describes \[Bob\], \[Alice\], but the story field names none"),
    ],
)
def test_story_errors_name_the_line(story: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_story(story, SHEET)


def test_error_in_sentence_mode_names_the_line_of_the_sentence() -> None:
    with pytest.raises(ValueError, match=r"line 3 .*: \[NC\] says"):
        parse_story("[Bob] walks.\nHe\nruns. [NC] [Bob] rests.", split_by="sentence")


def test_unknown_split_mode() -> None:
    with pytest.raises(ValueError, match=r"'word'.*auto, line, paragraph, sentence"):
        parse_story("x", split_by="word")


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        ("[Bob] a man\n[BOB] a boy", r"line 2 \('\[BOB\] a boy'\): \[BOB\] is described a second time"),
        ("[Bob] a man\n\nAlice a girl", r"line 3 \('Alice a girl'\): write one character per line"),
        ("[Bob] a man [Alice] a girl", "line 1 .*: write one character per line"),
        ("a man [Bob]", "line 1 .*: write one character per line"),
        ("[Bob] : .", r"line 1 .*: \[Bob\] has no description"),
        ("[NC] nobody", r"line 1 .*: \[NC\] marks"),
        ("[Bob a man", r"line 1 .*: a \[ is not closed"),
        ("[ ] a man", r"line 1 .*: the tag \[\] is empty"),
    ],
)
def test_sheet_errors_name_the_line(sheet: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"Characters, {message}"):
        parse_characters(sheet)


def test_sheet() -> None:
    assert parse_characters("\n[Bob] a man, wearing a black suit\r\n【爱丽丝】：一个女孩。\n") == {
        "Bob": "a man, wearing a black suit",
        "爱丽丝": "一个女孩",
    }
    assert parse_characters("") == {}
