"""Tags such as [Bob], and the sheet that describes whom they name. Host-free."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from .invisible import without_invisible
from .lines import numbered_lines
from .place import Place, name_some, quote
from .sentences import has_words

NO_CHARACTER = "nc"
MARKS = str.maketrans("【】［］", "[][]")
TAG = re.compile(r"(?<!\\)\[([^\[\]]*)\]")
_BRACKET = re.compile(r"(?<!\\)[\[\]]")
_VARIANTS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
TRAILING = " \t\u3000.,;:。．｡，、；："


def parse_characters(text: str) -> dict[str, str]:
    """Read a character sheet, `[Name] description` on each line, into {name: description}.

    Raises ValueError naming the line for a line without `[Name]`, a second tag, a missing description, a name
    used twice, and the reserved name NC.
    """
    sheet: dict[str, str] = {}
    known: set[str] = set()
    for number, source in numbered_lines(text):
        line = source.translate(MARKS)
        where = Place("Characters", number, line)
        check_brackets(line, where)
        tags = TAG.findall(line)
        if len(tags) != 1 or not line.startswith("["):
            raise ValueError(f"{where}: write one character per line, as in '[Bob] a man with a red cap'.")
        name = _name_in(tags[0], where)
        if name_key(name) == NO_CHARACTER:
            raise ValueError(f"{where}: [NC] marks panels without a character. Choose another name.")
        if name_key(name) in known:
            raise ValueError(f"{where}: [{name}] is described a second time. Keep one line per character.")
        description = unescape(line[line.index("]") + 1 :].lstrip(" \t\u3000:：-–—").rstrip(TRAILING))
        if not has_words(description):
            raise ValueError(f"{where}: [{name}] has no description. Say what the character looks like.")
        sheet[name] = description
        known.add(name_key(name))
    return sheet


class Cast:
    """Resolves the tags of one input: case, spacing and full-width letters do not make a different character."""

    def __init__(self, sheet: dict[str, str], field: str) -> None:
        self.sheet = sheet
        self.field = field
        self._names = {name_key(name): name for name in sheet}
        self._resolved: dict[str, str | None] = {}
        """By a tag as it is written: a story names the same few over and over."""

    def resolve(self, tag: str, where: Place) -> str | None:
        """The name that `tag` stands for, None for NC."""
        if tag not in self._resolved:
            self._resolved[tag] = self._resolve(tag, where)
        return self._resolved[tag]

    def _resolve(self, tag: str, where: Place) -> str | None:
        name = _name_in(tag, where)
        if name_key(name) == NO_CHARACTER:
            return None
        if self.sheet and name_key(name) not in self._names:
            place, known = where.at(f"[{tag}]"), as_tags(self.sheet)
            raise ValueError(f"{place}: [{quote(name)[1:-1]}] is not in the characters field, which describes {known}.")
        # Without a sheet the first spelling in the story is the name.
        return self._names.setdefault(name_key(name), name)


def check_brackets(line: str, where: Place) -> None:
    """ValueError for a bracket without its partner."""
    # As long as the line, so that the bracket is found at its own place.
    if bracket := _BRACKET.search(TAG.sub(lambda tag: " " * len(tag[0]), line)):
        problem = "a [ is not closed" if bracket[0] == "[" else "a ] has no [ before it"
        raise ValueError(
            f"{where.around(bracket.start())}: {problem}. Write tags as [Name]; \\[ and \\] are plain brackets."
        )


def as_tags(names: Iterable[str]) -> str:
    """Names as they are written in a story: "[Bob], [Alice]"."""
    return name_some(f"[{name}]" for name in names)


def _name_in(tag: str, where: Place) -> str:
    name = " ".join(tag.split())
    if not name:
        raise ValueError(f"{where.at(f'[{tag}]')}: the tag [] is empty. Write a name in it, or [NC] for no character.")
    return name


def name_key(name: str) -> str:
    """What two spellings of one name have in common.

    Unicode's toNFKC_Casefold, and one i: Turkish has two, and where a name is typed decides which comes out.
    """
    name = _VARIANTS.sub("", without_invisible(" ".join(name.split())))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).casefold()
    return unicodedata.normalize("NFKC", folded).replace("i\u0307", "i").replace("ı", "i")


def unescape(text: str) -> str:
    """Turn escaped brackets and hashes into plain ones."""
    return re.sub(r"\\([\[\]#＃])", r"\1", text)
