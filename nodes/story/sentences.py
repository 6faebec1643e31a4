"""Cut a story's lines into panels: one per line, per paragraph or per sentence.

The sentences of English, Chinese, Japanese and Korean are found by Wikimedia's `sentencex`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import sentencex

SPLIT_MODES = ("auto", "line", "paragraph", "sentence")

_KANA = re.compile(r"[\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9d]")
_HANGUL = re.compile(r"[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd]")

# sentencex ends a sentence at every closing quote, so `「走れ！」と言った。` comes back in two pieces. These
# are the openings, per language, of a piece that still belongs to the quotation before it.
_AFTER_QUOTE = {
    "zh": re.compile(r"[^，。！？“”「」]{0,8}[说說道问問喊叫答]"),
    "ja": re.compile(r"と|って"),
    "ko": re.compile(r"(?:이라|라|하)?고(?![가-힣])"),
}
_QUOTE_END = re.compile(r"[\"”’」』]\s*$")


@dataclass(frozen=True)
class Passage:
    """Story text that starts on line `line` (from 1); `caption` is None where none was written."""

    line: int
    text: str
    caption: str | None


def language_of(text: str) -> str:
    """Language code by script: kana `ja`, Hangul `ko`, Han `zh`, anything else `en`."""
    if _KANA.search(text):
        return "ja"
    if _HANGUL.search(text):
        return "ko"
    return "zh" if _HAN.search(text) else "en"


def split_sentences(text: str) -> list[str]:
    """Split `text` into sentences without losing a character: the pieces joined give `text` again."""
    language = language_of(text)
    continuation = _AFTER_QUOTE.get(language)
    sentences: list[str] = []
    for piece in sentencex.segment(language, text):
        if sentences and (
            not has_words(piece)
            or not has_words(sentences[-1])
            or (continuation and _QUOTE_END.search(sentences[-1]) and continuation.match(piece))
        ):
            sentences[-1] += piece
        else:
            sentences.append(piece)
    return sentences


def has_words(text: str) -> bool:
    """Whether `text` holds a letter or digit of any script."""
    return any(character.isalnum() for character in text)


def split_passages(lines: list[Passage], split_by: str) -> list[Passage]:
    """Regroup a story's non-blank `lines` into one passage per panel.

    - `line`: each line is a panel.
    - `paragraph`: lines with no blank line between them are a panel; their captions are joined.
    - `sentence`: each sentence is a panel. Lines of one paragraph run on, but a line that begins with a tag
      begins a panel, and a caption ends one: it belongs to the sentence it follows.
    - `auto`: `line` if there are several lines, `sentence` if the story is a single one.
    """
    if split_by not in SPLIT_MODES:
        raise ValueError(f"split_by is {split_by!r}. Choose one of: {', '.join(SPLIT_MODES)}.")
    if split_by == "line" or (split_by == "auto" and len(lines) > 1):
        return lines
    if split_by == "paragraph":
        return [_joined(paragraph) for paragraph in _paragraphs(lines)]
    return [sentence for paragraph in _paragraphs(lines) for run in _runs(paragraph) for sentence in _sentences_of(run)]


def _paragraphs(lines: list[Passage]) -> Iterator[list[Passage]]:
    paragraph: list[Passage] = []
    for line in lines:
        # Blank lines are left out, so a gap in the numbers is where one stood.
        if paragraph and line.line != paragraph[-1].line + 1:
            yield paragraph
            paragraph = []
        paragraph.append(line)
    if paragraph:
        yield paragraph


def _runs(paragraph: list[Passage]) -> Iterator[list[Passage]]:
    run: list[Passage] = []
    for line in paragraph:
        if run and (run[-1].caption is not None or line.text.startswith("[")):
            yield run
            run = []
        run.append(line)
    yield run


def _separator(lines: list[Passage]) -> str:
    return "" if language_of("".join(line.text for line in lines)) in ("zh", "ja") else " "


def _joined(lines: list[Passage]) -> Passage:
    captions = [line.caption for line in lines if line.caption is not None]
    text = _separator(lines).join(line.text for line in lines if line.text)
    return Passage(lines[0].line, text, " ".join(captions) if captions else None)


def _sentences_of(run: list[Passage]) -> Iterator[Passage]:
    whole = _joined(run)
    sentences = split_sentences(whole.text) or [""]
    starts = _line_starts(run)
    offset = 0
    for number, sentence in enumerate(sentences, 1):
        line = max(line for start, line in starts if start <= offset)
        yield Passage(line, sentence.strip(), whole.caption if number == len(sentences) else None)
        offset += len(sentence)


def _line_starts(run: list[Passage]) -> list[tuple[int, int]]:
    """(offset into the joined text, line number) for each line of the run that has text."""
    starts, offset, separator = [(0, run[0].line)], 0, _separator(run)
    for line in run:
        if line.text:
            starts.append((offset, line.line))
            offset += len(line.text) + len(separator)
    return starts
