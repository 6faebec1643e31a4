"""The contact sheet: layout, untouched pixels, wrapped captions, and fonts for the captions' scripts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from storydiffusion.nodes.pages.caption_fonts import CaptionFont, scripts_of, system_font_folders
from storydiffusion.nodes.pages.layout import MOST_LINES, contact_sheet, wrap

LATIN = "Éléonore à Łódź, Jürgen, İzmir, Việt — “ça va?” Ελληνικά Ωμέγα Привет Ґудзик…"
CJK = {"zh": "鲍勃醒来，他说：“你好！”", "ja": "ボブは「おはよう」と言った。", "ko": "밥은 숲으로 걸어간다."}


def pictures(count: int, height: int = 96, width: int = 128) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(count))


def where_pasted(page: torch.Tensor, image: torch.Tensor) -> tuple[int, int]:
    """(top, left) of an exact copy of `image` in the page."""
    height, width = image.shape[:2]
    for top, left in (page[0] == image[0, 0]).all(-1).nonzero().tolist():
        if torch.equal(page[0, top : top + height, left : left + width], image):
            return top, left
    raise AssertionError("the panel is not on the page, or its pixels changed")


@pytest.mark.parametrize(
    ("count", "columns", "expected"),
    [
        (1, 0, (1, 1)),
        (2, 0, (1, 2)),
        (4, 0, (2, 2)),
        (6, 0, (2, 3)),
        (7, 3, (3, 3)),
        (3, 8, (1, 3)),
        (3, 1, (3, 1)),
    ],
)
def test_layout_keeps_every_pixel(count: int, columns: int, expected: tuple[int, int]) -> None:
    images = pictures(count, 96, 96)
    page, warning = contact_sheet(images, ["A caption"] * count, columns)
    places = [where_pasted(page, image) for image in images]
    assert places == sorted(places)
    rows, in_a_row = len({top for top, _ in places}), len({left for _, left in places})
    assert (rows, in_a_row) == expected
    assert page.dtype == torch.float32
    assert warning == ""


def test_caption_is_drawn_under_its_own_panel() -> None:
    images = pictures(2)
    page, _ = contact_sheet(images, ["", "Here"], 2)
    (top, left), (_, right) = (where_pasted(page, image) for image in images)
    under = page[0, top + 96 :]
    assert under[:, left : left + 128].min() == 1
    assert under[:, right : right + 128].min() < 0.2


def test_long_captions_make_their_row_higher_and_are_not_cut() -> None:
    short, _ = contact_sheet(pictures(1), ["word"])
    long, _ = contact_sheet(pictures(1), ["word " * 60])
    font = CaptionFont([], 12)
    lines = wrap("word " * 60, font, 128 - 2 * (font.line_height // 3))
    assert long.shape[1] - short.shape[1] == (len(lines) - 1) * font.line_height


@pytest.mark.parametrize("width", [20, 60, 100, 400])
@pytest.mark.parametrize(
    "text", [LATIN, *CJK.values(), "anextremelylongwordwithoutspaces and more", "Bob（鲍勃）说hello。"]
)
def test_wrap_fits_and_loses_nothing(text: str, width: int) -> None:
    font = CaptionFont([text], 12)
    lines = wrap(text, font, width)
    assert all(font.width(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_latin_wraps_between_words_and_chinese_between_characters() -> None:
    font = CaptionFont([], 12, folders=())
    assert wrap("walks through forests", font, font.width("walks through")) == ["walks through", "forests"]
    chinese = "鲍勃醒来他走了"
    assert wrap(chinese, font, font.width(chinese[:3])) == [chinese[:3], chinese[3:6], chinese[6:]]
    # A closing mark does not begin a line; it takes its character along.
    assert wrap("鲍勃醒。来", font, font.width("鲍勃醒")) == ["鲍勃", "醒。来"]


def test_a_word_wider_than_a_line_is_cut_where_the_line_is_full() -> None:
    font = CaptionFont([], 12, folders=())
    word = "Incomprehensibilities" * 40
    lines = wrap(f"an {word} end", font, 150)
    assert "".join(lines).replace(" ", "") == f"an{word}end"
    assert [lines[0], lines[-1][-3:]] == ["an", "end"]
    for line, following in pairwise(lines[1:]):
        assert font.width(line) <= 150 < font.width(line + following[0])


class CountingFont(CaptionFont):
    """Counts the characters that it measures."""

    measured = 0

    def width(self, text: str) -> float:
        self.measured += len(text)
        return super().width(text)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["x", "鲍。", "word "], ids=["word", "chinese", "words"])
def test_wrapping_is_no_more_work_per_character_in_a_long_caption(unit: str) -> None:
    def work(characters: int) -> int:
        font = CountingFont([], 12, folders=())
        wrap(unit * (characters // len(unit)), font, 300)
        return font.measured

    assert work(4_000) < 16 * work(500)  # twice the characters' share; quadratic work would be 64 times as much


class NarrowFont(CaptionFont):
    """Draws nothing, so that all fits."""

    def width(self, text: str) -> float:
        return 0


def test_pieces_are_found_in_one_pass() -> None:
    # Looking ahead from each bracket to the end would take minutes.
    brackets = "(" * 500_000
    assert wrap(brackets, NarrowFont([], 12, folders=()), 1) == [brackets]


def test_bundled_font_draws_latin_greek_and_cyrillic() -> None:
    assert CaptionFont([LATIN], 12, folders=()).missing == set()


@pytest.mark.parametrize(("language", "script"), [("zh", "CJK"), ("ja", "Hiragana, Katakana"), ("ko", "Hangul")])
def test_warning_when_no_font_has_the_script(language: str, script: str) -> None:
    page, warning = contact_sheet(pictures(2), ["Latin", CJK[language]], font_folders=())
    assert "panel 2:" in warning
    assert script in warning
    assert "Noto Sans CJK" in warning
    assert page.shape[0] == 1


def test_long_list_of_missing_characters_is_shortened() -> None:
    caption = "".join(map(chr, range(0x4E00, 0x4E40)))
    _, warning = contact_sheet(pictures(1), [caption], font_folders=())
    assert "draws 64 of the characters" in warning
    assert caption[:20] + "..." in warning


def test_unreadable_fonts_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "NotoSansCJK-Regular.ttc").write_bytes(b"not a font")
    assert CaptionFont(["鲍勃"], 12, folders=(tmp_path, tmp_path / "absent")).missing == set("鲍勃")


@pytest.mark.parametrize("language", CJK)
def test_system_font_draws_cjk(language: str) -> None:
    without, with_system = CaptionFont([CJK[language]], 24, folders=()), CaptionFont([CJK[language]], 24)
    if with_system.missing:
        pytest.skip(f"no font for {language} is installed in {', '.join(map(str, system_font_folders()))}")
    bitmaps = [
        [bytes(run_font.getmask(run)) for run, run_font in font.runs(CJK[language])] for font in (without, with_system)
    ]
    assert bitmaps[0] != bitmaps[1]
    assert contact_sheet(pictures(1), [CJK[language]])[1] == ""


def test_scripts_of() -> None:
    assert scripts_of("鲍") == ["CJK"]
    assert scripts_of("한🙂") == ["Hangul", "symbols"]


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (8, 8, 3), (1, 0, 8, 3)])
def test_wrong_image_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape .*must be \[panels, height, width, 3\]"):
        contact_sheet(torch.zeros(shape), [""] * shape[0])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"images has {channels} channels; a picture has 3, or 4 with alpha"):
        contact_sheet(torch.zeros(1, 8, 8, channels), [""])


def test_alpha_is_left_out() -> None:
    images = pictures(3)
    with_alpha = torch.cat([images, torch.rand(3, 96, 128, 1)], -1)
    assert torch.equal(contact_sheet(with_alpha, ["a", "b", "c"])[0], contact_sheet(images, ["a", "b", "c"])[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_pixels_are_told_with_their_panels(value: float) -> None:
    images = pictures(4)
    images[1, 3, 4, 2] = images[3, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"images has pixels that are NaN or infinite, in panel 2, 4\. .*--fp32-vae"):
        contact_sheet(images, ["a"] * 4)


def test_a_broken_alpha_is_nobodys_business() -> None:
    images = torch.cat([pictures(1), torch.full((1, 96, 128, 1), torch.nan)], -1)
    assert contact_sheet(images, ["a"])[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_told(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"images has numbers of the type {name}; .*divide .* by 255"):
        contact_sheet(torch.ones(1, 8, 8, 3, dtype=dtype), [""])


def test_values_a_little_out_of_range_stay() -> None:
    images = pictures(2) * 1.2 - 0.1
    assert images.min() < 0
    assert images.max() > 1
    page, _ = contact_sheet(images, ["a", "b"])
    for image in images:
        where_pasted(page, image)


def test_half_precision_pictures_are_drawn() -> None:
    images = pictures(1).half()
    where_pasted(contact_sheet(images, ["a"])[0], images[0].float())


@pytest.mark.slow
def test_captions_end_at_the_most_lines() -> None:
    a_line = "mmmmmmmmmm "  # of 128 pixels, no two of these words fit
    page, _ = contact_sheet(pictures(1), [a_line * MOST_LINES])
    assert page.shape[1] > MOST_LINES * 12
    with pytest.raises(ValueError, match=f"The caption of panel 1 takes more than {MOST_LINES} lines .*128 pixels"):
        contact_sheet(pictures(1), [a_line * (MOST_LINES + 1)])


@pytest.mark.parametrize("caption", ["word " * 20_000, "x" * 200_000])
def test_an_endless_caption_is_told_without_being_quoted_whole(caption: str) -> None:
    with pytest.raises(ValueError, match="The caption of panel 2 takes more than") as error:
        contact_sheet(pictures(3), ["a", caption, "c"])
    message = str(error.value)
    assert f"{len(caption.strip())} characters" in message
    assert caption[:60] in message
    assert caption[:81] not in message
    assert len(message) < 400


def test_wrong_number_of_images_and_columns() -> None:
    with pytest.raises(ValueError, match="There are 3 images, but the story has 2 panels"):
        contact_sheet(pictures(3), ["a", "b"])
    with pytest.raises(ValueError, match="columns is -1"):
        contact_sheet(pictures(1), ["a"], -1)
