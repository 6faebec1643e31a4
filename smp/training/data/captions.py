"""Captions of videos: a table, or text files beside them."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from .videos import BrokenVideoError


def read_captions(table: Path) -> dict[str, str]:
    """Captions by a video's relative name, from a CSV file with the columns `video` and `caption`.

    Raises:
        ValueError: no such file, not UTF-8, or other columns.
    """
    if not table.is_file():
        raise ValueError(f"There is no table of captions at {table}.")
    rows = csv.DictReader(io.StringIO(read_text(table), newline=""))
    if not {"video", "caption"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{table.name} has the columns {rows.fieldnames}; it needs 'video' and 'caption'.")
    return {row["video"]: row["caption"] for row in rows}


def caption_of(folder: Path, name: str, captions: dict[str, str]) -> str:
    """The table's caption, or else the text file beside the video, or else none: ''.

    Raises:
        BrokenVideoError: the text file is not UTF-8.
    """
    if name in captions:
        return captions[name].strip()
    text = _text_file(folder, name)
    try:
        return read_text(text).strip() if text.is_file() else ""
    except ValueError as error:
        raise BrokenVideoError(f"its caption {error}") from error


def captions_digest(folder: Path, names: Iterable[str], captions: dict[str, str]) -> str:
    """SHA-256 of the captions of all these videos, also of those that are not UTF-8."""
    digest = hashlib.sha256()
    for name in names:
        text = _text_file(folder, name)
        content = text.read_bytes() if name not in captions and text.is_file() else captions.get(name, "").encode()
        digest.update(hashlib.sha256(content.strip()).digest())
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """A text file's content; ValueError, with the name and the place, when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise ValueError(f"{path.name} is not UTF-8: {wrong}") from error


def _text_file(folder: Path, name: str) -> Path:
    return (folder / name).with_suffix(".txt")
