"""Find fonts that can draw a story's captions: the bundled one, then what the system has for other scripts.

The bundled Open Sans draws Latin with accents, Greek and Cyrillic. The names of system fonts only order the
search: a font is used for a character if the glyph it draws isn't its "missing" one.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from arabic_reshaper import ArabicReshaper
from bidi.mirror import MIRRORED
from PIL import ImageFont

from ..story.sentences import language_of
from .reading_order import Direction

BUNDLED_FONT = Path(__file__).parent / "fonts" / "OpenSans-Regular.ttf"

# Han characters are drawn differently in China, Japan and Korea: families to look at first, by language.
_FAMILIES = {
    "en": re.compile("dejavusans|notosans|arialunicode|segoeui"),
    "zh": re.compile("(cjk|sans)(sc|cn)|pingfang|msyh|yahei|simhei|wqy|heiti|droidsansfallback"),
    "ja": re.compile("(cjk|sans)jp|hiragino|ヒラギノ|yugoth|meiryo|msgothic|ipag|takao|vlgothic"),
    "ko": re.compile("(cjk|sans)kr|applesdgothic|malgun|nanum|undotum|baekmuk"),
}
_BROAD_FAMILIES = re.compile("cjk|sourcehan|arialunicode|unifont")
_UNUSUAL_CUT = re.compile("bold|black|heavy|thin|light|italic|oblique|condensed|mono|serif")
_PROBE_SIZE = 32
# A noncharacter (Unicode 23.7): no font maps it, so every font draws its "missing" glyph for it.
_UNMAPPED = "\uffff"
# Joined forms as characters, for Pillow without the FriBiDi library (as on Windows), which then doesn't shape letters.
_JOINER = ArabicReshaper(configuration={"delete_harakat": False, "use_unshaped_instead_of_isolated": True})


def system_font_folders() -> tuple[Path, ...]:
    """The folders in which this operating system and its user keep fonts."""
    home = Path.home()
    if sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
        return (
            Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts",
            local / "Microsoft" / "Windows" / "Fonts",
        )
    if sys.platform == "darwin":
        # Fonts that macOS fetches on demand, some Chinese and Japanese ones, lie among other assets.
        assets = Path("/System/Library/AssetsV2").glob("com_apple_MobileAsset_Font*")
        return (Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts", *assets)
    user = Path(os.environ.get("XDG_DATA_HOME", home / ".local" / "share"))
    shared = os.environ.get("XDG_DATA_DIRS", "/usr/local/share:/usr/share").split(":")
    return (user / "fonts", home / ".fonts", *(Path(folder) / "fonts" for folder in shared if folder))


class CaptionFont:
    """Fonts of one size that together draw a set of captions; `missing` is what none of them can draw."""

    def __init__(self, captions: Iterable[str], size: int, folders: Sequence[Path] | None = None) -> None:
        """Choose fonts for `captions` at `size` pixels, from `folders` (default: the system's) if need be."""
        text = "".join(captions)
        self._fonts = [ImageFont.truetype(str(BUNDLED_FONT), size)]
        self.missing = uncovered(ImageFont.truetype(str(BUNDLED_FONT), _PROBE_SIZE), set(text))
        self._font_of: dict[str, ImageFont.FreeTypeFont] = {}
        folders = system_font_folders() if folders is None else folders
        while self.missing and (found := _best_font(folders, self.missing, language_of(text))):
            path, index, still_missing = found
            font = ImageFont.truetype(str(path), size, index=index)
            self._font_of.update(dict.fromkeys(self.missing - still_missing, font))
            self._fonts.append(font)
            self.missing = still_missing
        metrics = [font.getmetrics() for font in self._fonts]
        self.ascent = max(ascent for ascent, _ in metrics)
        self.line_height = self.ascent + max(descent for _, descent in metrics)

    def runs(self, text: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
        """Cut `text` into stretches that one font draws."""
        run, run_font = "", self._fonts[0]
        for character in text:
            font = self._font_of.get(character, self._fonts[0])
            # Marks stay with their letter; a space or a mark never starts a font of its own.
            if font is not run_font and not (run and _invisible(character)):
                if run:
                    yield run, run_font
                run, run_font = "", font
            run += character
        if run:
            yield run, run_font

    def placed(
        self, text: str, direction: Direction | None
    ) -> Iterator[tuple[str, ImageFont.FreeTypeFont, str | None]]:
        """Cut `text`, which runs in one direction, into what one font draws, from left to right.

        Yields what Pillow takes: the text, the font and the direction (None: the font's own way with it).
        """
        runs = list(self.runs(text))
        for run, font in reversed(runs) if direction == "rtl" else runs:
            if direction is None or font.layout_engine == ImageFont.Layout.RAQM:
                yield run, font, direction
            else:
                yield _unshaped(run, font, direction), font, None

    def width(self, text: str) -> float:
        """Width of `text` on one line, in pixels."""
        return sum(font.getlength(run) for run, font in self.runs(text))


def uncovered(font: ImageFont.FreeTypeFont, characters: Iterable[str]) -> set[str]:
    """The visible `characters` for which `font` draws its "missing" glyph."""
    missing = _bitmap(font, _UNMAPPED)
    return {c for c in characters if not _invisible(c) and _bitmap(font, c) == missing}


def scripts_of(characters: Collection[str]) -> list[str]:
    """Readable names of the scripts of `characters`, such as `Hangul`; `symbols` for what is no letter."""
    letters = [character for character in characters if character.isalpha()]
    names = {unicodedata.name(letter, "unnamed").split()[0] for letter in letters}
    scripts = sorted(name if name == "CJK" else name.capitalize() for name in names)
    return [*scripts, "symbols"] if len(letters) < len(characters) else scripts


def _unshaped(run: str, font: ImageFont.FreeTypeFont, direction: Direction) -> str:
    """`run` as it looks from left to right, for a font that puts one glyph behind the other."""
    if direction == "rtl":
        joined = _JOINER.reshape(run)
        if not uncovered(font, joined):  # fonts that leave joining to a shaping engine may lack these forms
            run = joined
        # Marks come to stand before their letter: in such a font they reach out to the right.
        run = "".join(MIRRORED.get(character, character) for character in reversed(run))
    # Without a shaping engine a joiner or a direction mark is drawn, as a box.
    return "".join(character for character in run if unicodedata.category(character) != "Cf")


def _bitmap(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def _invisible(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Mn", "Zs", "Zl", "Zp")


def _best_font(folders: Sequence[Path], needed: set[str], language: str) -> tuple[Path, int, set[str]] | None:
    """(file, face, what it lacks) of the first font that draws all of `needed`, else of the best one."""
    best: tuple[Path, int, set[str]] | None = None
    for path in sorted(_font_files(folders), key=lambda path: _rank(path.stem, language)):
        for index, font in sorted(_faces(path), key=lambda face: _rank(f"{face[1].getname()}", language)):
            lacking = uncovered(font, needed)
            if len(lacking) < len(needed if best is None else best[2]):
                best = path, index, lacking
            if not lacking:
                return best
    return best


def _font_files(folders: Sequence[Path]) -> set[Path]:
    endings = (".ttf", ".otf", ".ttc", ".otc")
    return {path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in endings}


def _rank(name: str, language: str) -> tuple[int, bool, str]:
    plain = re.sub(r"[\s_-]", "", name).lower()
    rank = 0 if _FAMILIES[language].search(plain) else 1 if _BROAD_FAMILIES.search(plain) else 2
    return rank, bool(_UNUSUAL_CUT.search(plain.replace("sansserif", ""))), plain


def _faces(path: Path) -> Iterator[tuple[int, ImageFont.FreeTypeFont]]:
    """Every face of a font file; none for a file that FreeType can't open or scale (bitmap fonts)."""
    index = 0
    while True:
        try:
            # Basic layout: a shaping engine would draw a dotted circle under a lone mark.
            font = ImageFont.truetype(str(path), _PROBE_SIZE, index=index, layout_engine=ImageFont.Layout.BASIC)
        except OSError:
            return
        yield index, font
        index += 1
