"""Where each letter of a caption stands in its line: the Unicode bidirectional algorithm (UAX 9). Host-free.

Hebrew and Arabic run from right to left, numbers and Latin words in them from left to right. `python-bidi` puts a text
into visual order; what is here finds out which letter went where, cuts lines, and names the direction of each piece.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Literal
from unicodedata import bidirectional

from bidi import get_base_level, get_display

Direction = Literal["ltr", "rtl"]

# The algorithm sees nothing of a character but its bidi class, and of a bracket that it opens or closes: two characters
# of each class, to be told apart where they come out. The brackets count as one and the same pair (BD16).
_STAND_INS = {
    "L": "ab", "R": "אב", "AL": "صض", "EN": "01", "AN": "٠١", "ES": "+-", "ET": "$%", "CS": ",:",
    "NSM": "\u0301\u0302", "BN": "\u200b\u200c", "WS": " \u2003", "ON": "!&",
    "Ps": "\u2329\u3008", "Pe": "\u232a\u3009",
}  # fmt: skip
_ONES = frozenset(pair[1] for pair in _STAND_INS.values())
# Embeddings and isolates: they have no second character and no picture.
_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_TURNING = ("R", "AL", "AN", "RLE", "RLO", "RLI")
_OWN_DIRECTION: dict[str, Direction] = {"L": "ltr", "EN": "ltr", "AN": "ltr", "R": "rtl", "AL": "rtl"}


class ReadingOrder:
    """The order of a caption's letters from left to right, for every line that is cut out of it.

    `right_to_left` is the base direction: that of the first letter that has one.
    """

    def __init__(self, caption: str) -> None:
        self._caption = caption
        self._turns = any(bidirectional(character) in _TURNING for character in caption)
        pairs = [_stand_ins(character) for character in caption] if self._turns else []
        self.right_to_left = self._turns and get_base_level("".join(pair[0] for pair in pairs)) == 1
        self._visual = _visual_order(pairs, "R" if self.right_to_left else "L")
        self._rank = {index: rank for rank, index in enumerate(self._visual)}
        self._direction = self._directions()

    def pieces(self, start: int, end: int) -> list[tuple[str, Direction | None]]:
        """The line `caption[start:end]` as pieces from left to right, each in logical order with its direction.

        The direction is None for the one piece of a caption in which nothing runs from right to left.
        """
        if not self._turns:
            return [(self._caption[start:end], None)]
        # Any two letters of a line stand as they do in the whole caption: what is turned around (rule L2) depends on
        # the levels between them alone.
        visual = sorted((index for index in range(start, end) if index in self._rank), key=self._rank.__getitem__)
        found: list[tuple[str, Direction | None]] = []
        for stretch in _stretches(visual, self._direction):
            direction = self._direction[stretch[0]]
            text = "".join(self._caption[index] for index in sorted(stretch))
            if direction == "ltr":
                found.append((text, direction))
            else:
                cut = reversed(list(_cut(text)))
                found += [(piece, _OWN_DIRECTION.get(bidirectional(piece[0]), direction)) for piece in cut]
        return found

    def _directions(self) -> dict[int, Direction]:
        base: Direction = "rtl" if self.right_to_left else "ltr"
        directions = {}
        for stretch in _stretches(self._visual, {}):
            up: Direction = "ltr" if stretch[0] < stretch[-1] else "rtl"
            directions.update(dict.fromkeys(stretch, up if len(stretch) > 1 else base))
        return directions


def _visual_order(pairs: list[str], base: str) -> list[int]:
    """Indices of the characters, given by their stand-ins, in their order from left to right; without the controls.

    The library gives characters, not indices, so it is asked once per binary digit of an index: each character is
    replaced by that stand-in of its class that says whether the digit is 0 or 1.
    """
    indices, shown = [0] * len(pairs), ""
    for digit in range(len(pairs).bit_length()):
        shown = get_display("".join(pair[index >> digit & 1] for index, pair in enumerate(pairs)), base_dir=base)
        indices = [index | (character in _ONES) << digit for index, character in zip(indices, shown, strict=True)]
    return [index for index, character in zip(indices, shown, strict=True) if character not in _CONTROLS]


def _stand_ins(character: str) -> str:
    if character in _CONTROLS:
        return character * 2
    category = unicodedata.category(character)
    if category in ("Ps", "Pe") and unicodedata.mirrored(character):
        return _STAND_INS[category]
    return _STAND_INS.get(bidirectional(character), _STAND_INS["L"])


def _stretches(visual: list[int], direction: Mapping[int, Direction]) -> Iterator[list[int]]:
    """Cut a visual order where it jumps in the text, or the direction changes: into stretches up or down by one."""
    stretch: list[int] = []
    for index in visual:
        if stretch and (abs(index - stretch[-1]) != 1 or direction.get(index) != direction.get(stretch[-1])):
            yield stretch
            stretch = []
        stretch.append(index)
    if stretch:
        yield stretch


def _cut(text: str) -> Iterator[str]:
    """Cut a right-to-left stretch around its lone digits and left-to-right letters.

    Without its surroundings, a shaping engine would order "5%" anew: as one number, which it isn't after an Arabic
    letter.
    """
    for lone, characters in groupby(text, lambda character: _OWN_DIRECTION.get(bidirectional(character)) == "ltr"):
        piece = "".join(characters)
        yield from piece if lone else [piece]
