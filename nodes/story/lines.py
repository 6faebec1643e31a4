"""The lines of a story or a character sheet, without what people and language models put around them. Host-free."""

from __future__ import annotations

import re

from .invisible import without_invisible

# "- ", "• ", "1. ", "12) ", "(3) ", "４．", "5、", "Panel 6: ". A year, or a number that goes on, is no marker.
_LIST_MARKER = re.compile(
    r"(?:[-*+•‣▪●◦](?:\s+|$)|[・·]\s*|\(?\d{1,3}(?:[.):](?:\s+|$)|[．）、]\s*)|(?:panel|scene)\s\d{1,3}\s?[.:)](?:\s+|$))",
    re.IGNORECASE,
)
_RULE = re.compile(r"[-*_=–—]{3,}")
_BOLD = re.compile(r"\*{2,}")
_ITALIC_TAG = re.compile(r"\*(?=\[)|(?<=\])\*")


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines that say something, with their numbers from 1: no blank ones, no headings, no list markers.

    Any line ending is fine, and a byte order mark.
    """
    lines = enumerate(without_invisible(text).splitlines(), 1)
    told = ((number, line.strip()) for number, line in lines if line.strip() and not is_heading(line.strip()))
    return [(number, without_list_markers(line)) for number, line in told]


def without_list_markers(line: str) -> str:
    """A story's line without the marker and the emphasis with which lists are written: `1. **[Bob]** walks`."""
    line = _ITALIC_TAG.sub("", _BOLD.sub("", line)).strip()
    marker = _LIST_MARKER.match(line)
    return line[marker.end() :] if marker else line


def is_heading(line: str) -> bool:
    """Whether a line is a title of what follows, or a rule between two parts, as in Markdown."""
    return line.startswith(("#", "＃")) or bool(_RULE.fullmatch(line))
