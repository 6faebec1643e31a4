"""Captions that run from right to left: the order of their letters, and where the letters are drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from bidi import get_display
from PIL import Image, ImageDraw, ImageFont, features
from storydiffusion.nodes.pages.caption_fonts import CaptionFont, system_font_folders
from storydiffusion.nodes.pages.layout import contact_sheet, wrap
from storydiffusion.nodes.pages.reading_order import ReadingOrder
from torch.nn.functional import conv2d

WIDTH, FONT_SIZE = 624, 24
MIRRORED = str.maketrans("()[]«»<>", ")(][»«><")


def shown(text: str, start: int = 0, end: int | None = None) -> str:
    """The line from left to right, as a reader of the page sees it."""
    pieces = ReadingOrder(text).pieces(start, len(text) if end is None else end)
    return "".join(piece[::-1].translate(MIRRORED) if direction == "rtl" else piece for piece, direction in pieces)


# What UAX 9 asks for, letter by letter; capitals stand for Hebrew letters here, "{" begins an Arabic word.
@pytest.mark.parametrize(
    ("logical", "visual"),
    [
        ("MA, ZE? KEN.", ".NEK ?EZ ,AM"),
        ("SHALOM OLAM 123", "123 MALO MOLAHS"),
        ('AMAR "hello" VE HALAX.', '.XALAH EV "hello" RAMA'),
        ("SHALOM Bob (the boy) HALAX".replace("Bob", "bob"), "XALAH bob (the boy) MOLAHS"),
        ("ABA (YELED) BA", "AB (DELEY) ABA"),
        ("ABA (bob cat)", "(bob cat) ABA"),
        ("bob (ABA 12)", "bob (12 ABA)"),
        ("ABA 1,234.5 BA", "AB 1,234.5 ABA"),
        ("ABA 5% BA", "AB 5% ABA"),
        ("ABA 1 2 BA", "AB 2 1 ABA"),
        ("he said «SHALOM OLAM» twice", "he said «MALO MOLAHS» twice"),
        ("he said SHALOM (OLAM).", "he said (MALO) MOLAHS."),
        ("he said SHALOM 12, 34", "he said 34 ,12 MOLAHS"),
        ("plain (words), 12", "plain (words), 12"),
    ],
)
def test_visual_order(logical: str, visual: str) -> None:
    hebrew = str.maketrans({chr(65 + n): chr(0x5D0 + n) for n in range(26)})
    assert shown(logical.translate(hebrew)) == visual.translate(hebrew)


def test_numbers_after_arabic_letters() -> None:
    # W2 and W5: such digits are no European number, so the sign stands on its own, as the hyphen does.
    assert shown("ا 5%") == "%5 ا"
    assert shown("ا 12-34") == "34-12 ا"
    assert shown("ا ١٢٣") == "١٢٣ ا"


def test_marks_and_joiners_stay_in_their_word() -> None:
    assert ReadingOrder("می‌خواهم x").pieces(0, 10) == [("x", "ltr"), ("می‌خواهم ", "rtl")]
    assert ReadingOrder("שָׁלוֹם").pieces(0, 7) == [("שָׁלוֹם", "rtl")]
    assert ReadingOrder("x שָ q\u0323").pieces(0, 7) == [("x ", "ltr"), ("שָ", "rtl"), (" q\u0323", "ltr")]


def test_direction_controls_are_followed_and_not_drawn() -> None:
    assert shown("\u2067abc אב\u2069") == "בא abc"
    assert shown("a \u2066אב\u2069 c") == "a בא c"
    assert shown("x \u202eabc\u202c") == "x cba"


def test_base_direction_is_that_of_the_first_letter() -> None:
    assert ReadingOrder('"12 אבא hello').right_to_left
    assert not ReadingOrder('"12 hello אבא').right_to_left
    assert not ReadingOrder("12").right_to_left
    assert not ReadingOrder("").right_to_left


def test_captions_without_right_to_left_letters_stay_one_piece() -> None:
    text = "Éléonore (12), 鲍勃 говорит"
    assert ReadingOrder(text).pieces(2, 20) == [(text[2:20], None)]


def test_a_line_keeps_the_order_of_its_caption() -> None:
    # The comma lies between words of one language, so it stays with them though the line ends there.
    text = "אבא hello, world"
    assert shown(text, 0, 10) == "hello, אבא"[:7] + "אבא"[::-1]
    assert shown(text, 11) == "world"
    assert shown("a א (ב) c", 6) == "( c"  # the bracket, cut off from its word, still is that of the word
    assert shown("ا 1 22-33", 4) == "33-22"  # an Arabic letter in the line before


def test_the_letters_are_the_librarys_in_its_order() -> None:
    chance = random.Random(0)
    alphabet = "abאבשל12٣٤,.:-+%$()\"'«» \u05b8\u064b\u200fش鲍\ud800"
    for _ in range(500):
        text = "".join(chance.choices(alphabet, k=chance.randrange(1, 40))).strip()
        order = ReadingOrder(text)
        if order.pieces(0, len(text))[0][1] is None:
            continue
        pieces = order.pieces(0, len(text))
        visual = "".join(piece[::-1] if direction == "rtl" else piece for piece, direction in pieces)
        expected = get_display(text.replace("\ud800", "z"), base_dir="R" if order.right_to_left else "L")
        assert visual.replace("\ud800", "z") == expected


@pytest.fixture(params=["raqm", "basic"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Draw with a shaping engine, and as Pillow does where it finds no FriBiDi."""
    if request.param == "raqm" and not features.check("raqm"):
        pytest.skip("Pillow has no Raqm here: its wheel looks for the library FriBiDi")
    if request.param == "basic":
        basic = partial(ImageFont.truetype, layout_engine=ImageFont.Layout.BASIC)
        # What finds the fonts gives the layout itself.
        monkeypatch.setattr(ImageFont, "truetype", lambda *args, **options: basic(*args, **options))
    return request.param


def ink(caption: str) -> np.ndarray:
    """How dark the strip under a panel is, [height, WIDTH], 0 to 1."""
    if CaptionFont([caption], FONT_SIZE).missing:
        pytest.skip(f"no font for {caption} is installed in {', '.join(map(str, system_font_folders()))}")
    page, warning = contact_sheet(torch.ones(1, 8, WIDTH, 3), [caption], 1)
    assert warning == ""
    return 1 - page[0, :, WIDTH // 32 : WIDTH // 32 + WIDTH, 0].numpy()


def columns_of(strip: np.ndarray) -> np.ndarray:
    return np.flatnonzero(strip.max(0) > 0.2)


def first_and_last_line(strip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.flatnonzero(strip.max(1) > 0.2)
    breaks = np.flatnonzero(np.diff(rows) > 3)
    return strip[: rows[breaks[0]] + 2], strip[rows[breaks[-1]] + 2 :]


def place(strip: np.ndarray, visual_word: str) -> int:
    """Where a word stands, given from left to right: the best match of its letters, drawn one behind the other."""
    font = next(CaptionFont([visual_word], FONT_SIZE).runs(visual_word))[1]
    plain = ImageFont.truetype(font.path, FONT_SIZE, index=font.index, layout_engine=ImageFont.Layout.BASIC)
    image = Image.new("L", (WIDTH, 3 * FONT_SIZE), 0)
    ImageDraw.Draw(image).text((20, FONT_SIZE), visual_word, fill=255, font=plain)
    word = np.array(image) / 255
    rows, columns = (np.flatnonzero(word.max(axis) > 0.2) for axis in (1, 0))
    word = word[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    page, letters = (torch.from_numpy(array).float()[None, None] for array in (strip, word))
    overlap = conv2d(page, letters)
    dark = conv2d(page**2, torch.ones_like(letters)) * (letters**2).sum()
    alike = (overlap / dark.clamp_min(1e-6).sqrt())[0, 0]
    assert alike.max() > 0.85, f"{visual_word} is not there"
    return int(alike.max(0).values.argmax())


def places(strip: np.ndarray, words: Sequence[str]) -> list[int]:
    return [place(strip, word) for word in words]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("caption", "from_left"),
    [
        ("מה, זה? כן.", ["כן"[::-1], "זה"[::-1], "מה"[::-1]]),
        ("שלום עולם 123", ["123", "עולם"[::-1], "שלום"[::-1]]),
        ("אבא, Bob (12) הלך", ["הלך"[::-1], "Bob (12)", "אבא"[::-1]]),
        ("אבא (הלך) שלום", ["שלום"[::-1], "(", "הלך"[::-1], ")", "אבא"[::-1]]),
        ("Bob said שלום עולם, 12 times", ["Bob said", "12", "עולם"[::-1], "שלום"[::-1], "times"]),
    ],
)
def test_hebrew_words_are_drawn_in_visual_order(caption: str, from_left: list[str]) -> None:
    found = places(ink(caption), from_left)
    assert found == sorted(found)
    assert len(set(found)) == len(found)


@pytest.mark.usefixtures("engine")
def test_arabic_words_stand_around_a_quotation() -> None:
    strip = ink('قال "hello" ثم ذهب.')
    quoted = place(strip, '"hello"')
    # The letters of these words that join to nothing on either side are drawn as they are alone.
    assert place(strip, "ذ") < quoted < place(strip, "ﻗﺎ"[::-1])


@pytest.mark.usefixtures("engine")
def test_sentence_marks_stand_left_of_their_word() -> None:
    strip = ink("מה, זה? כן.")
    assert columns_of(strip)[0] < place(strip, "כן"[::-1]) - 3
    assert place(strip, "כן"[::-1]) < place(strip, "?") < place(strip, "זה"[::-1])


@pytest.mark.usefixtures("engine")
def test_arabic_letters_are_joined() -> None:
    def parts(caption: str) -> int:
        return 1 + int((np.diff(columns_of(ink(caption))) > 1).sum())

    assert parts("بيت") == 1
    assert parts("بيت كتب") == 2
    assert parts("ادا") == 3  # letters that join to none after them


@pytest.mark.parametrize("engine", ["basic"], indirect=True)
def test_without_shaping_a_font_gets_only_what_it_draws(engine: str) -> None:
    font = CaptionFont([], FONT_SIZE, folders=())  # has no Arabic letters, so no joined ones either
    assert [run for run, _, _ in font.placed("بيت", "rtl")] == ["بيت"[::-1]]
    assert [run for run, _, _ in font.placed("a\u200fb\u200d", "ltr")] == ["ab"]
    assert [run for run, _, _ in font.placed("a\u200fb", None)] == ["a\u200fb"], engine


@pytest.mark.usefixtures("engine")
def test_a_line_is_ordered_by_what_stands_before_it() -> None:
    # The same number at the beginning, and alone in the last line after an Arabic letter, where W2 makes it another.
    def caption(letters: int) -> str:
        return f"12-34 {'ا' * letters} 12-34"

    font = CaptionFont([caption(1)], FONT_SIZE)
    width = WIDTH - 2 * (font.line_height // 3)
    strip = ink(next(text for text in map(caption, range(300)) if wrap(text, font, width)[-1] == "12-34"))
    _, last = first_and_last_line(strip)
    assert place(last, "34") < place(last, "12")


@pytest.mark.usefixtures("engine")
def test_captions_begin_at_their_own_side() -> None:
    margin = CaptionFont([], FONT_SIZE).line_height // 3
    hebrew, latin = columns_of(ink("שלום Bob")), columns_of(ink("Bob שלום"))
    assert 0 <= WIDTH - margin - hebrew[-1] < 8
    assert hebrew[0] > WIDTH / 2
    assert 0 <= latin[0] - margin < 8
    assert latin[-1] < WIDTH / 2


@pytest.mark.usefixtures("engine")
def test_lines_break_in_reading_order() -> None:
    first, last = "שלום", "עולם"
    strip = ink(f"{first} {'אבא הלך, ' * 12}{last}")
    top, bottom = first_and_last_line(strip)
    margin = CaptionFont([first], FONT_SIZE).line_height // 3
    assert columns_of(top)[-1] - place(top, first[::-1]) < 4 * FONT_SIZE
    assert abs(place(bottom, last[::-1]) - columns_of(bottom)[0]) < 4
    for line in (top, bottom):
        assert columns_of(line)[-1] > WIDTH - margin - 8
        assert columns_of(line)[0] >= margin - 8
