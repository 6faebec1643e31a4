"""Read a story and its character sheet: one prompt, one caption and a set of characters per panel.

    [Bob] a man with a red cap                 <- character sheet, one character per line
    [Alice] a girl, wearing a blue dress

    [Bob] walks in the forest #A quiet morning <- story; the caption runs to the end of the line
    [Bob] gives [Alice] a flower
    [NC] the sun sets over the lake

Where a character's description goes: tags in front of the text are labels and become "a man with a red cap,
walks in the forest" (or "A and B, ..."). A tag inside the sentence is a word of it: "a man with a red cap,
gives a girl, wearing a blue dress, a flower", so that a text encoder reads who does what to whom. A
description appears once per panel; later tags of the same character, and a possessive ([Bob]'s dog), become
the name. Without a sheet every tag becomes the name. In Chinese, Japanese and Korean text the words that stand for a
character are kept apart from their neighbours by a space: [小明]和[小红]跳舞 becomes "小明 和 小红 跳舞".

Marks typed on a CJK keyboard (【Bob】, ［Bob］, ＃) mean the same. `\\[`, `\\]`, `\\#` are plain characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from .invisible import without_invisible
from .lines import numbered_lines
from .markup import as_caption, ends_in_embedding, mark_bracket_syntax, separate_embeddings, write_bracket_syntax
from .model import UNNAMED_CHARACTER, Panel, Story
from .place import Place
from .sentences import Passage, has_words, language_of, split_passages
from .styles import apply_style, join_negative, style_named
from .tags import (
    MARKS,
    NO_CHARACTER,
    TAG,
    TRAILING,
    Cast,
    as_tags,
    check_brackets,
    name_key,
    parse_characters,
    unescape,
)

_NEIGHBOURHOOD = 200
"""Characters around a tag that are looked at: longer than any word."""
_HASH = re.compile(r"(?<!\\)[#＃]")
_TAGS_THAT_TOUCH = re.compile(r"(?<!\\)\](?=\[)")
_BETWEEN_LABELS = re.compile(r"(?:\s|[,，、&:：]|\band\b)*")
# A tag that runs on into CJK text or a possessive is a word of the sentence: 【ボブ】が走る, [Bob]'s dog.
_GLUED = re.compile(r"['’\u1100-\u11ff\u3041-\u30ff\u3131-\u318e\u3400-\u9fff\uac00-\ud7a3]")


def parse_story(
    story: str,
    characters: str = "",
    *,
    split_by: str = "auto",
    style: str = "none",
    negative: str = "",
    field: str = "Story",
) -> Story:
    """Cut `story` into panels (see `split_passages`) and write each panel's prompt.

    A panel that names no character keeps those of the last panel that named one; `[NC]` empties its own panel
    only. A sheet of a single character applies to the whole of a story without tags. `field` is how errors call
    the input that holds the text.

    Raises ValueError for an empty story and, naming the line, for a panel without text, a bracket without its
    partner, and a `[Name]` that the given sheet does not describe.
    """
    style_named(style)
    cast = Cast(parse_characters(characters), field)
    lines = [_story_line(number, source, cast) for number, source in numbered_lines(story)]
    if not lines:
        raise ValueError("The story is empty. Write one line per panel, as in '[Bob] walks in the forest'.")
    present = _characters_before_first_tag(lines, cast)
    panels, notices = [], []
    for number, passage in enumerate(split_passages(lines, split_by), 1):
        panel, present = _panel(passage, cast, present, style)
        panels.append(panel)
        notices += [_untagged(name, number) for name in untagged_names(passage.text, panel.characters, cast.sheet)]
    return Story(tuple(panels), join_negative(without_invisible(negative), style), tuple(notices))


def untagged_names(text: str, present: Collection[str], sheet: Collection[str]) -> list[str]:
    """Names of the sheet that stand in a panel's text as plain words, without being `present` there."""
    if not present and any(name_key(tag) == NO_CHARACTER for tag in TAG.findall(text)):
        return []  # [NC] says that nobody is meant to stand here
    plain = TAG.sub(" ", text)
    words = set(re.findall(r"\w+", plain))
    absent = (name for name in sheet if name not in present)
    # Chinese, Japanese and Korean put no spaces around a name; a name of one letter is any word's part there.
    return [
        name
        for name in absent
        if name in words or (name in plain and (" " in name or (len(name) > 1 and language_of(name) != "en")))
    ]


def _untagged(name: str, panel: int) -> str:
    return f"{name} is described, but not tagged in panel {panel}: write [{name}] for the description to go in."


def _story_line(number: int, source: str, cast: Cast) -> Passage:
    where = Place(cast.field, number, source)
    text, mark, caption = source, _HASH.search(source), None
    if mark:
        text, caption = source[: mark.start()].rstrip(), unescape(source[mark.end() :].strip())
    # Captions keep their brackets: only what goes into the prompt has tags.
    text = text.translate(MARKS)
    if not cast.sheet:
        text = mark_bracket_syntax(text)
    check_brackets(text, where)
    for tag in TAG.findall(text):
        cast.resolve(tag, where)
    return Passage(number, text, caption)


def _characters_before_first_tag(lines: list[Passage], cast: Cast) -> tuple[str, ...]:
    sheet = cast.sheet
    tags = [tag for line in lines for tag in TAG.findall(line.text)]
    if any(name_key(tag) != NO_CHARACTER for tag in tags):
        return ()
    if not sheet:
        return (UNNAMED_CHARACTER,)
    if len(sheet) > 1 and not all(TAG.search(line.text) for line in lines):
        raise ValueError(
            f"The characters field describes {as_tags(sheet)}, but the {cast.field.lower()} field names none of them. "
            f"Write the tag where a character enters, as in '[{next(iter(sheet))}] walks in the forest'."
        )
    return tuple(sheet) if len(sheet) == 1 else ()


def _panel(passage: Passage, cast: Cast, present: tuple[str, ...], style: str) -> tuple[Panel, tuple[str, ...]]:
    """The panel of `passage`, and the characters that a next panel without tags keeps."""
    where = Place(cast.field, passage.line, write_bracket_syntax(passage.text))
    tags = [cast.resolve(tag, where) for tag in TAG.findall(passage.text)]
    named = tuple(dict.fromkeys(name for name in tags if name is not None))
    if None in tags and named:
        raise ValueError(f"{where}: [NC] says that no character stands here, but [{named[0]}] is named as well.")
    labels, text = _split_labels(passage.text, cast, where)
    if not has_words(text):
        raise ValueError(f"{where}: the panel is empty. Write what happens in it, after its tags and before any #.")
    if not tags:
        labels = list(present)
    described = dict.fromkeys(labels)
    action = write_bracket_syntax(_write_names(text, cast, where, described)).rstrip(TRAILING)
    # Whoever the sentence names without describing (a possessive) is described in front of it.
    labels += [name for name in named if name in cast.sheet and name not in described]
    prompt = _with_labels(labels, cast.sheet, action)
    caption = passage.caption
    if caption is None:
        caption = as_caption(_write_names(text, cast, where))
    characters = () if None in tags else named or present
    in_prompt = [name for name in dict.fromkeys([*labels, *described, *characters]) if name in characters]
    subjects = {name: cast.sheet.get(name, name) for name in in_prompt if name != UNNAMED_CHARACTER}
    prompt = separate_embeddings(apply_style(prompt, style))
    return Panel(prompt, caption, characters, subjects=subjects), named or present


def _split_labels(text: str, cast: Cast, where: Place) -> tuple[list[str], str]:
    """Take the tags in front of `text` off it: (their names without NC, the rest)."""
    labels: list[str] = []
    end = 0
    while tag := TAG.match(text, end):
        name = cast.resolve(tag[1], where)
        if name is not None and _GLUED.match(text, tag.end()):
            break
        if name is not None and name not in labels:
            labels.append(name)
        between = _BETWEEN_LABELS.match(text, tag.end())
        end = between.end() if between and TAG.match(text, between.end()) else tag.end()
    return labels, text[end:].lstrip(" \t\u3000,，、:：")


def _write_names(text: str, cast: Cast, where: Place, described: dict[str, None] | None = None) -> str:
    """Write every tag of `text` as words: NC as nothing, others as the name.

    For a prompt, where `described` is given, a character that isn't in it yet gets its description, and is added.
    """

    if described is not None:
        text = _TAGS_THAT_TOUCH.sub("] ", text)

    def words(tag: re.Match[str]) -> str:
        name = cast.resolve(tag[1], where)
        if name is None:
            return ""
        before = text[max(tag.start() - _NEIGHBOURHOOD, 0) : tag.start()]
        behind = text[tag.end() : tag.end() + _NEIGHBOURHOOD]
        following = behind[:1]
        space = " " if following.isalnum() and not _GLUED.match(following) else ""
        if described is None or name in described or (name in cast.sheet and following in ("'", "’")):
            return name + space
        described[name] = None
        phrase = cast.sheet.get(name, name)
        after = space or _gap(phrase, behind)
        # "a girl, wearing a blue dress, a flower": the clause has to end before the sentence goes on.
        if name in cast.sheet and re.search("[,，、]", phrase) and (following.isspace() or following.isalnum()):
            after = ("," if language_of(phrase) == "en" else "，") + space
        if ends_in_embedding(phrase) and after.strip():  # of all marks only a plain comma may touch it
            after = f"{after} " if after[0] == "," else f" {after}"
        return _gap(before, phrase) + phrase + after

    return unescape(" ".join(TAG.sub(words, text).split()))


def _gap(left: str, right: str) -> str:
    """What keeps apart two texts that meet: a space where CLIP's tokenizer would read on over the seam in CJK text.

    It takes letters that touch for one word, which in CJK text is a whole clause, and then there are no tokens that
    tell of a character and of nothing else. And ComfyUI takes what touches an embedding for a part of its name.
    """
    touch = left and right and not left[-1].isspace() and not right[0].isspace()
    if touch and ((ends_in_embedding(left) and right[0] not in ",)") or right.startswith("embedding:")):
        return " "
    seam = unicodedata.normalize("NFC", left)[-1:], right[:1]
    return " " if all(letter.isalpha() for letter in seam) and language_of("".join(seam)) != "en" else ""


def _with_labels(labels: list[str], sheet: dict[str, str], action: str) -> str:
    """Put descriptions (or, without a sheet, names) in front of the panel's action."""
    subjects = [sheet.get(name, name) for name in labels if name != UNNAMED_CHARACTER]
    if not subjects:
        return action
    latin = language_of("".join(subjects)) == "en"
    # A description with a comma of its own needs one before "and", or the next subject joins its list.
    conjunction = ", and " if any("," in subject for subject in subjects) else " and "
    subject = conjunction.join(subjects) if latin else ", ".join(subjects)
    # "Bob walks" reads as a sentence; a description, or a text that is a sentence already, stands beside it.
    is_sentence = not sheet and action[:1].islower()
    return subject + (" " if is_sentence else ", ") + action
