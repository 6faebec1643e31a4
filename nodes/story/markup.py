"""Prompt syntax in a story: embeddings, weights, brackets of other programs. Host-free."""

from __future__ import annotations

import re

from .tags import TAG

SYNTAX_OPENS, SYNTAX_CLOSES = "\ufdd0", "\ufdd1"
"""Noncharacters, which no text holds (Unicode 23.7): brackets of a prompt's own syntax, while tags are looked for."""
_DOUBLED = re.compile(r"(?<![\[\\])\[{2,}([^\[\]]*)\]{2,}")
_SYNTAX = re.compile(f"(?<!{SYNTAX_OPENS}){SYNTAX_OPENS}+([^{SYNTAX_OPENS}{SYNTAX_CLOSES}]*){SYNTAX_CLOSES}+")
_NUMBER = re.compile(r"\s*-?(?:\d+(?:\.\d*)?|\.\d+)\s*")

# Marks that end a clause. Those of the first row may stand within a file's name, but not end it.
_PLAIN_MARKS = ".;!?'"
_MARKS = '…。．｡！？；：、，"“”‘’„«»‹›「」『』〈〉《》【】'
_EMBEDDING = re.compile(rf"(?<![^\s(])embedding:([^\s,()<\[:{_MARKS}]*[^\s,()<\[:{_MARKS}{_PLAIN_MARKS}])")
_TOUCHES_LEFT = re.compile(rf"(?<=[,:{_MARKS}{_PLAIN_MARKS}])(?=embedding:)")
_TOUCHED_RIGHT = re.compile(rf"({_EMBEDDING.pattern})(?=[{_MARKS}]|[{_PLAIN_MARKS}]+(?:[\s,){_MARKS}]|$))")
_LORA = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_ESCAPED = re.compile(r"\\([()\[\]{}#＃\\])")
_GONE = "\ufdd2"
"""A noncharacter in the place of what is taken out of a caption."""


def mark_bracket_syntax(line: str) -> str:
    """`line` with the brackets of other programs' prompt syntax marked: `[red:blue:0.5]`, `[a|b]`, `[[fog]]`.

    For stories whose characters aren't described: there, what stands in brackets could be anybody's name.
    """
    line = _DOUBLED.sub(lambda found: found[0].replace("[", SYNTAX_OPENS).replace("]", SYNTAX_CLOSES), line)

    def marked(tag: re.Match[str]) -> str:
        return f"{SYNTAX_OPENS}{tag[1]}{SYNTAX_CLOSES}" if ":" in tag[1] or "|" in tag[1] else tag[0]

    return TAG.sub(marked, line)


def write_bracket_syntax(prompt: str) -> str:
    """`prompt` with the brackets that `mark_bracket_syntax` has marked."""
    return prompt.replace(SYNTAX_OPENS, "[").replace(SYNTAX_CLOSES, "]")


def separate_embeddings(prompt: str) -> str:
    """`prompt` with a space between an `embedding:name` and the quotes and marks that touch it.

    ComfyUI looks for an embedding at the beginning of a word and up to the next space, and takes what touches it for a
    part of its name; a comma and the parentheses of a weight it knows itself.
    """
    return _TOUCHED_RIGHT.sub(r"\1 ", _TOUCHES_LEFT.sub(" ", prompt))


def embedding_names(prompt: str) -> list[str]:
    """The names of the embeddings that a prompt asks for."""
    return _EMBEDDING.findall(prompt)


def ends_in_embedding(text: str) -> bool:
    """Whether the last word is an embedding, so that nothing may touch it."""
    return bool(_EMBEDDING.fullmatch(text.rpartition(" ")[2]))


def as_caption(text: str) -> str:
    """What a reader is shown of a prompt: no weights, embeddings, LoRAs and escapes."""
    bare = " ".join(_LORA.sub("", _SYNTAX.sub(_shown, text)).split())
    # What held the embedding and its neighbours apart goes with it.
    marked = _EMBEDDING.sub(_GONE, bare).replace(f" {_GONE}", _GONE)
    if marked.startswith(_GONE):
        marked = marked.lstrip(f"{_GONE} ,;")
    return " ".join(_without_weights(marked.replace(_GONE, "")).split())


def _shown(syntax: re.Match[str]) -> str:
    """What is drawn in the end of `[red:blue:0.5]`, and first of `[a|b]`."""
    words = syntax[1].split("|")[:1] if "|" in syntax[1] else syntax[1].split(":")
    return next((word.strip() for word in reversed(words) if word.strip() and not _NUMBER.fullmatch(word)), "")


def _without_weights(text: str) -> str:
    """`text` without the parentheses of weights, `(word:1.2)` and `((word))`; escaped ones become plain."""
    pieces: list[str] = []
    opened: list[int] = []  # where in `pieces` parentheses are open
    closed: dict[int, int] = {}  # where they were closed, and where these were opened
    index = 0
    while index < len(text):
        escaped = _ESCAPED.match(text, index)
        if escaped is None and text[index] == "(":
            opened.append(len(pieces))
        pieces.append(escaped[1] if escaped else text[index])
        if escaped is None and text[index] == ")" and opened:
            start, end = opened.pop(), len(pieces) - 1
            if _take_weight(pieces, end):
                pieces[start] = pieces[end] = ""
            elif closed.get(end - 1) == start + 1:
                for place in (start, start + 1, end - 1, end):
                    pieces[place] = ""
            closed[end] = start
        index += len(escaped[0]) if escaped else 1
    return "".join(pieces)


def _take_weight(pieces: list[str], end: int) -> bool:
    """Empty the pieces of `:1.2` in front of index `end`; whether there are any."""
    start = end - 1
    while start >= 0 and pieces[start] and pieces[start] in "0123456789. -":
        start -= 1
    if start < 0 or pieces[start] != ":" or not _NUMBER.fullmatch("".join(pieces[start + 1 : end])):
        return False
    pieces[start:end] = [""] * (end - start)
    return True
