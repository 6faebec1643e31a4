"""Lay out a story's panels on one page, each with its caption under it."""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..story.model import CONNECT_PANEL_COUNT, Story
from .caption_fonts import CaptionFont, scripts_of
from .reading_order import ReadingOrder

_PAGE_ASPECT = 4 / 3
_INK = 26  # near-black, of 255
_LEAST_FONT_SIZE = 12
_SHOWN_IN_WARNING = 20
_QUOTED = 60
_MEASURED_AT_ONCE = 256  # characters: more than an ordinary line has
# Letters grow with the panel, so this is a strip about ten times as high as the panel is wide, of 10,000 letters.
MOST_LINES = 200

_CJK = r"\u2e80-\u30ff\u31f0-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003fffd"
_OPENING = r"(\[{«“‘「『（［【〈《"
_CLOSING = r")\]}»”’」』）］】〉》。、，．！？：；…ー・,.!?:;"
# What must not be torn apart: a CJK character with the marks that may not begin or end a line, else a word.
# Korean puts spaces between words, so it wraps as Latin does.
_PIECE = re.compile(
    rf"[{_OPENING}]*[{_CJK}][{_CLOSING}]*|"
    rf"[^\s{_CJK}]*[^\s{_CJK}{_OPENING}](?=[{_OPENING}]*[{_CJK}])[{_CLOSING}]*|[^\s{_CJK}]+|\s+"
)


def story_page(images: torch.Tensor, story: Story, columns: int) -> tuple[torch.Tensor, str]:
    """The `contact_sheet` of a story's panels.

    Raises ValueError for the story of Add Reference Panels with the panels alone: its captions begin with those of the
    pictures.
    """
    references = sum(panel.is_reference for panel in story.panels)
    if references and images.shape[0] != len(story.panels):
        raise ValueError(
            f"There are {images.shape[0]} images, but this story has {len(story.panels)} panels, of which {references} "
            "are reference pictures. Connect the story of Story Prompt Splitter, not that of Add Reference Panels, and "
            "take the panels alone with Get Image from Batch: reference_count to batch_index, panel_count to length."
        )
    return contact_sheet(images, [panel.caption for panel in story.panels], columns)


def contact_sheet(
    images: torch.Tensor,
    captions: Sequence[str],
    columns: int = 0,
    font_folders: Sequence[Path] | None = None,
) -> tuple[torch.Tensor, str]:
    """Put `images` [B, H, W, 3 or 4] (0..1) on one page and write `captions` (B of them) underneath.

    `columns` is the most panels in a row, 0 for a number that makes the page about 4:3 with few empty places.
    `font_folders` are searched for scripts that the bundled font lacks (default: the system's folders).

    Returns the page [1, H', W', 3], in which the panels' pixels are unchanged but for alpha, which is left out, and a
    warning, empty if every character of the captions could be drawn. Raises ValueError for another shape or type,
    for NaN and infinite pixels, a number of captions other than B, a caption of more than MOST_LINES lines, and
    negative `columns`.
    """
    pixels = _pixels(images)
    count, height, width = pixels.shape[:3]
    if len(captions) != count:
        raise ValueError(
            f"There are {count} images, but the story has {len(captions)} panels. Give one image per panel. "
            f"{CONNECT_PANEL_COUNT} A Get Image from Batch takes it as length."
        )
    if columns < 0:
        raise ValueError(f"columns is {columns}. Use 0 for automatic, or the number of panels in a row.")
    columns = min(columns, count) or _automatic_columns(count, width, height)
    captions = [unicodedata.normalize("NFC", " ".join(caption.split())) for caption in captions]
    font = CaptionFont(captions, max(_LEAST_FONT_SIZE, round(width / 26)), font_folders)
    wrapped = [_caption_lines(caption, font, width, panel) for panel, caption in enumerate(captions, 1)]
    strips = [_caption_strip(caption, lines, font, width) for caption, lines in zip(captions, wrapped, strict=True)]
    return _page(pixels, strips, columns), _warning(captions, font.missing)


def wrap(text: str, font: CaptionFont, width: float) -> list[str]:
    """Break `text` into lines of at most `width` pixels: between words, and between CJK characters.

    A word wider than a line is broken where the line ends.
    """
    return list(_lines(text, font, width))


def _lines(text: str, font: CaptionFont, width: float) -> Iterator[str]:
    line = ""
    for match in _PIECE.finditer(text):
        piece = match[0]
        if line and _fitting(line + piece, font, width) < len((line + piece).rstrip()):
            yield line.rstrip()
            line = ""
        line += piece.lstrip() if not line else piece
        while len(line) > 1 and (fitting := _fitting(line, font, width)) < len(line.rstrip()):
            end = max(1, fitting)
            yield line[:end]
            line = line[end:]
    if line.strip():
        yield line.rstrip()


def _fitting(text: str, font: CaptionFont, width: float) -> int:
    """How many characters of `text` fit into `width`, without measuring many more than those."""
    fitting, tried = 0, min(len(text), _MEASURED_AT_ONCE)
    while font.width(text[:tried]) <= width:
        if tried == len(text):
            return tried
        fitting, tried = tried, min(len(text), 2 * tried)
    between = range(fitting + 1, tried)
    return fitting + bisect_right(between, width, key=lambda end: font.width(text[:end]))


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """The colours of `images` as float32 on the CPU, [B, H, W, 3]. Raises ValueError if they can't be drawn."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images has the shape {tuple(images.shape)}; it must be [panels, height, width, 3].")
    if images.shape[-1] not in (3, 4):
        raise ValueError(
            f"images has {images.shape[-1]} channels; a picture has 3, or 4 with alpha. Connect the IMAGE output of "
            "VAE Decode or Load Image; a mask becomes a picture with Convert Mask to Image."
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images has numbers of the type {str(images.dtype).removeprefix('torch.')}; pictures are floating-point, "
            "from 0 to 1. The node that made them doesn't follow ComfyUI: divide whole numbers of 0 to 255 by 255."
        )
    pixels = images[..., :3].detach().to("cpu", torch.float32)
    broken = (~pixels.isfinite()).flatten(1).any(1).nonzero().flatten()
    if len(broken):
        raise ValueError(
            f"images has pixels that are NaN or infinite, in panel {_listed(broken + 1)}. Most often the VAE "
            "overflowed in half precision: start ComfyUI with --fp32-vae, or use a VAE made for it."
        )
    return pixels


def _listed(numbers: torch.Tensor) -> str:
    shown = ", ".join(str(number) for number in numbers[:_SHOWN_IN_WARNING].tolist())
    return shown + (", ..." if len(numbers) > _SHOWN_IN_WARNING else "")


def _automatic_columns(count: int, width: int, height: int) -> int:
    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        empty = 1 - count / (columns * rows)
        return empty + abs(math.log(columns * width / (rows * height) / _PAGE_ASPECT))

    return min(range(1, count + 1), key=cost)


def _margin(font: CaptionFont) -> int:
    return font.line_height // 3


def _caption_lines(caption: str, font: CaptionFont, width: int, panel: int) -> list[str]:
    lines = list(islice(_lines(caption, font, width - 2 * _margin(font)), MOST_LINES + 1))
    if len(lines) > MOST_LINES:
        raise ValueError(
            f"The caption of panel {panel} takes more than {MOST_LINES} lines under a picture {width} pixels wide: it "
            f'has {len(caption)} characters and begins "{caption[:_QUOTED]}". Give the panel a short caption after # '
            "in the story, or divide its text among more panels."
        )
    return lines


def _caption_strip(caption: str, lines: Sequence[str], font: CaptionFont, width: int) -> torch.Tensor:
    """`caption`, wrapped into `lines`, in dark letters on white, [h, width]."""
    margin = _margin(font)
    order = ReadingOrder(caption)
    image = Image.new("L", (width, len(lines) * font.line_height + 2 * margin), 255)
    draw = ImageDraw.Draw(image)
    start = 0
    for number, line in enumerate(lines):
        start = caption.index(line, start)
        placed = [run for piece in order.pieces(start, start + len(line)) for run in font.placed(*piece)]
        start += len(line)
        widths = [run_font.getlength(run, direction=direction) for run, run_font, direction in placed]
        x = width - margin - sum(widths) if order.right_to_left else float(margin)
        baseline = margin + number * font.line_height + font.ascent
        for (run, run_font, direction), advance in zip(placed, widths, strict=True):
            draw.text((x, baseline), run, fill=_INK, font=run_font, anchor="ls", direction=direction)
            x += advance
    return torch.from_numpy(np.array(image)).float() / 255


def _page(images: torch.Tensor, strips: list[torch.Tensor], columns: int) -> torch.Tensor:
    height, width = images.shape[1:3]
    gap = max(4, width // 32)
    rows = [range(start, min(start + columns, len(strips))) for start in range(0, len(strips), columns)]
    strip_heights = [max(strips[panel].shape[0] for panel in row) for row in rows]
    page_height = gap + sum(height + strip + gap for strip in strip_heights)
    page = torch.ones(1, page_height, gap + columns * (width + gap), 3)
    top = gap
    for row, strip_height in zip(rows, strip_heights, strict=True):
        for column, panel in enumerate(row):
            left = gap + column * (width + gap)
            page[0, top : top + height, left : left + width] = images[panel]
            strip = strips[panel]
            page[0, top + height : top + height + strip.shape[0], left : left + width] = strip[..., None]
        top += height + strip_height + gap
    return page


def _warning(captions: Sequence[str], missing: set[str]) -> str:
    if not missing:
        return ""
    panels = [str(number) for number, caption in enumerate(captions, 1) if missing & set(caption)]
    shown = "".join(sorted(missing)[:_SHOWN_IN_WARNING]) + ("..." if len(missing) > _SHOWN_IN_WARNING else "")
    return (
        f"No font on this machine draws {len(missing)} of the characters in the caption of panel "
        f"{', '.join(panels)}: {shown} ({', '.join(scripts_of(missing))}). Boxes stand in their place. "
        "Install a font that has them (Noto Sans CJK has Chinese, Japanese and Korean) and run again."
    )
