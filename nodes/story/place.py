"""Where in a text something stands, as error messages say it. Host-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_QUOTED = 80
_NAMED = 20


@dataclass(frozen=True)
class Place:
    """A line of an input."""

    field: str
    line: int
    text: str

    def __str__(self) -> str:
        """The place of the whole line."""
        return self.around(0)

    def at(self, words: str) -> str:
        """The place of `words` on the line: of a long one, what stands around them is quoted."""
        return self.around(max(self.text.find(words), 0))

    def around(self, index: int) -> str:
        """The place of an index of the line."""
        return f"{self.field}, line {self.line} ({quote(self.text, index)})"


def quote(text: str, at: int = 0) -> str:
    """`text` in quotes, or of a long one some 80 characters with index `at` among them."""
    if len(text) <= _QUOTED:
        return repr(text)
    start = max(0, min(at - _QUOTED // 2, len(text) - _QUOTED))
    before, after = "..." * (start > 0), "..." * (start + _QUOTED < len(text))
    return repr(before + text[start : start + _QUOTED] + after)


def name_some(names: Iterable[str]) -> str:
    """Names, separated by commas; of very many the first twenty, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(quote(name)[1:-1] for name in names[:_NAMED]) + more
