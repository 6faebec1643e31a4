"""Lay out a story's panels on one page, each with its caption under it."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..story.model import CONNECT_PANEL_COUNT, Story
from .caption_fonts import CaptionFont, scripts_of

_PAGE_ASPECT = 4 / 3
_INK = 26  # near-black, of 255
_LEAST_FONT_SIZE = 12
_SHOWN_IN_WARNING = 20

_CJK = r"\u2e80-\u30ff\u31f0-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003fffd"
_OPENING = r"(\[{«“‘「『（［【〈《"
_CLOSING = r")\]}»”’」』）］】〉》。、，．！？：；…ー・,.!?:;"
# What must not be torn apart: a CJK character with the marks that may not begin or end a line, else a word.
# Korean puts spaces between words, so it wraps as Latin does.
_PIECE = re.compile(
    rf"[{_OPENING}]*[{_CJK}][{_CLOSING}]*|[^\s{_CJK}]+?(?=[{_OPENING}]*[{_CJK}])[{_CLOSING}]*|[^\s{_CJK}]+|\s+"
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
    """Put `images` [B, H, W, 3] (0..1) on one page and write `captions` (B of them) underneath.

    `columns` is the most panels in a row, 0 for a number that makes the page about 4:3 with few empty places.
    `font_folders` are searched for scripts that the bundled font lacks (default: the system's folders).

    Returns the page [1, H', W', 3], in which the panels' pixels are unchanged, and a warning, empty if every
    character of the captions could be drawn. Raises ValueError for another shape, a number of captions other
    than B, and negative `columns`.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.shape[0] == 0:
        raise ValueError(f"images has the shape {tuple(images.shape)}; it must be [panels, height, width, 3].")
    count, height, width = images.shape[:3]
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
    strips = [_caption_strip(caption, font, width) for caption in captions]
    page = _page(images.detach().to("cpu", torch.float32), strips, columns)
    return page, _warning(captions, font.missing)


def wrap(text: str, font: CaptionFont, width: float) -> list[str]:
    """Break `text` into lines of at most `width` pixels: between words, and between CJK characters.

    A word wider than a line is broken where the line ends.
    """
    lines, line = [], ""
    for piece in _PIECE.findall(text):
        if line and font.width((line + piece).rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece.lstrip() if not line else piece
        while font.width(line.rstrip()) > width and len(line) > 1:
            fitting = next((n for n in range(len(line) - 1, 1, -1) if font.width(line[:n]) <= width), 1)
            lines.append(line[:fitting])
            line = line[fitting:]
    return [*lines, line.rstrip()] if line.strip() else lines


def _automatic_columns(count: int, width: int, height: int) -> int:
    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        empty = 1 - count / (columns * rows)
        return empty + abs(math.log(columns * width / (rows * height) / _PAGE_ASPECT))

    return min(range(1, count + 1), key=cost)


def _caption_strip(caption: str, font: CaptionFont, width: int) -> torch.Tensor:
    """`caption` in dark letters on white, [h, width]."""
    margin = font.line_height // 3
    lines = wrap(caption, font, width - 2 * margin)
    image = Image.new("L", (width, len(lines) * font.line_height + 2 * margin), 255)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        x, baseline = float(margin), margin + number * font.line_height + font.ascent
        for run, run_font in font.runs(line):
            draw.text((x, baseline), run, fill=_INK, font=run_font, anchor="ls")
            x += run_font.getlength(run)
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
