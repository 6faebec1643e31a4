"""Tags such as [Bob], and the sheet that describes whom they name. Host-free."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from .sentences import has_words

NO_CHARACTER = "nc"
MARKS = str.maketrans("【】［］", "[][]")
TAG = re.compile(r"(?<!\\)\[([^\[\]]*)\]")
_BRACKET = re.compile(r"(?<!\\)[\[\]]")
TRAILING = " \t\u3000.,;:。．｡，、；："


def parse_characters(text: str) -> dict[str, str]:
    """Read a character sheet, `[Name] description` on each line, into {name: description}.

    Raises ValueError naming the line for a line without `[Name]`, a second tag, a missing description, a name
    used twice, and the reserved name NC.
    """
    sheet: dict[str, str] = {}
    for number, source in numbered_lines(text):
        where = f"Characters, line {number} ({source!r})"
        line = source.translate(MARKS)
        check_brackets(line, where)
        tags = TAG.findall(line)
        if len(tags) != 1 or not line.startswith("["):
            raise ValueError(f"{where}: write one character per line, as in '[Bob] a man with a red cap'.")
        name = _name_in(tags[0], where)
        if name_key(name) == NO_CHARACTER:
            raise ValueError(f"{where}: [NC] marks panels without a character. Choose another name.")
        if name_key(name) in map(name_key, sheet):
            raise ValueError(f"{where}: [{name}] is described a second time. Keep one line per character.")
        description = unescape(line[line.index("]") + 1 :].lstrip(" \t\u3000:：").rstrip(TRAILING))
        if not has_words(description):
            raise ValueError(f"{where}: [{name}] has no description. Say what the character looks like.")
        sheet[name] = description
    return sheet


class Cast:
    """Resolves the tags of one input: case, spacing and full-width letters do not make a different character."""

    def __init__(self, sheet: dict[str, str], field: str) -> None:
        self.sheet = sheet
        self.field = field
        self._names = {name_key(name): name for name in sheet}

    def resolve(self, tag: str, where: str) -> str | None:
        """The name that `tag` stands for, None for NC."""
        name = _name_in(tag, where)
        if name_key(name) == NO_CHARACTER:
            return None
        if self.sheet and name_key(name) not in self._names:
            known = as_tags(self.sheet)
            raise ValueError(f"{where}: [{name}] is not in the characters field, which describes {known}.")
        # Without a sheet the first spelling in the story is the name.
        return self._names.setdefault(name_key(name), name)


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Non-blank lines with their numbers from 1; a byte order mark and any line ending are fine."""
    lines = enumerate(text.removeprefix("\ufeff").splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def check_brackets(line: str, where: str) -> None:
    """ValueError for a bracket without its partner."""
    if bracket := _BRACKET.search(TAG.sub("", line)):
        problem = "a [ is not closed" if bracket[0] == "[" else "a ] has no [ before it"
        raise ValueError(f"{where}: {problem}. Write tags as [Name]; \\[ and \\] are plain brackets.")


def as_tags(names: Iterable[str]) -> str:
    """Names as they are written in a story: "[Bob], [Alice]"."""
    return ", ".join(f"[{name}]" for name in names)


def _name_in(tag: str, where: str) -> str:
    name = " ".join(tag.split())
    if not name:
        raise ValueError(f"{where}: the tag [] is empty. Write a name in it, or [NC] for no character.")
    return name


def name_key(name: str) -> str:
    """What two spellings of one name have in common."""
    return unicodedata.normalize("NFKC", " ".join(name.split())).casefold()


def unescape(text: str) -> str:
    """Turn escaped brackets and hashes into plain ones."""
    return re.sub(r"\\([\[\]#＃])", r"\1", text)
