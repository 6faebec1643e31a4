"""Characters that can't be seen, and what they must not make different. Host-free."""

from __future__ import annotations

import re
import unicodedata

# Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt): drawn as nothing wherever they stand.
_IGNORABLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_RUN = re.compile(f"[{_IGNORABLE}]+")
_JOINERS = "\u200c\u200d"
# Scripts in which letters are joined, or kept apart, by one of these: Arabic and its kin, Indic, Mongolian.
_JOINED_LETTER = re.compile("[\u0600-\u109f\u1780-\u18af\ufb50-\ufdff\ufe70-\ufefc]")


def without_invisible(text: str) -> str:
    """`text` as a reader sees it: without characters that are drawn as nothing.

    Two kinds do something to their neighbours and stay there: joiners between letters of scripts that join, as in
    Persian, and what makes one picture of several (joiners between emoji, variation selectors and tags behind them,
    ideographic variants).
    """

    def kept(run: re.Match[str]) -> str:
        before, after = text[run.start() - 1 : run.start()], text[run.end() : run.end() + 1]
        return "".join(character for character in run[0] if _acts(character, before, after))

    return _RUN.sub(kept, text)


def _acts(character: str, before: str, after: str) -> bool:
    """Whether an ignorable character changes how its visible neighbours, empty at the text's ends, are drawn."""
    if character in _JOINERS:
        letters = _JOINED_LETTER.match(before) and _JOINED_LETTER.match(after)
        return bool(letters) or (_is_picture(before) and _is_picture(after))
    if "\ufe00" <= character <= "\ufe0f" or "\U000e0020" <= character <= "\U000e007f":
        return _is_picture(before)
    return "\U000e0100" <= character <= "\U000e01ef" and "\u3400" <= before <= "\U0003ffff"


def _is_picture(character: str) -> bool:
    return bool(character) and unicodedata.category(character) in ("So", "Sk")
