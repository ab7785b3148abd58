"""Fonts that hold the characters to draw; matplotlib takes each character from the first that has it."""

from __future__ import annotations

import contextlib
import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from ebr_lib.logs import logger

LATIN = "DejaVu Sans"  # comes with matplotlib
CJK_PACKAGE, CJK_PIN = "noto-cjk-sans-otc", "noto-cjk-sans-otc==0.0.1"  # Noto Sans CJK Regular, OFL 1.1
# Debian's packages for what that font lacks, and a family of each
RARE_CJK_PACKAGE = "fonts-hanazono", "HanaMinB"  # CJK extensions B to F
SYMBOL_PACKAGE = "fonts-symbola", "Symbola"  # symbols, and emoji in black and white
SCRIPT_PACKAGE = "fonts-noto-core", "Noto Sans Thai"  # scripts of the world, without CJK
CJK_NAMES = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO")
SIMPLIFIED = ("SC", "CN", "GB", "YaHei", "Hei", "WenQuanYi", "Song", "Fallback")  # in names of families
UNUSABLE = (RuntimeError, NotImplementedError, OSError)  # what matplotlib raises on a font that it cannot draw with


def fonts_for(text: str, wanted: Sequence[str] = ()) -> list[str]:
    """Font families that together hold the characters of a text; Latin keeps matplotlib's own font.

    Tried in this order: `wanted` (families or font files), the system's fonts, the font of a PyPI package. One warning
    names the characters that no font holds, and what to install.
    """
    signs = {c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf", "Mn")}
    families, missing = [LATIN], signs - _held(LATIN, signs)
    for tier in (lambda: _wanted_families(wanted), _system_families, _new_families, _packaged_families):
        held = {family: _held(family, missing) for family in tier()} if missing else {}
        # `wanted` is the user's order; of the system's fonts, the one that holds most comes first
        for family in sorted(held, key=lambda f: -len(held[f])) if tier is _system_families else held:
            if held[family] & missing:
                families.append(family)
                missing -= held[family]
    if missing:
        _warn_missing(missing)
    return families


def _warn_missing(missing: set[str]) -> None:
    def named(signs: Sequence[str], most: int) -> str:
        return ", ".join(f"{c} (U+{ord(c):04X})" for c in signs[:most]) + (", …" if len(signs) > most else "")

    signs = sorted(missing)
    remedies = {sign: _remedy(sign) for sign in signs}
    brings = [
        f"`{way}` brings one for {named([sign for sign in signs if remedies[sign] == way], 3)}"
        for way in dict.fromkeys(filter(None, remedies.values()))
    ]
    logger.warning(
        "缺少字体 no font here holds %d of the characters to draw (%s): they are drawn as boxes; %s",
        len(missing),
        named(signs, 8),
        "; ".join([*brings, "or name a font that holds them in chinese_fonts"]),
    )


def _remedy(sign: str) -> str | None:
    """The command that installs a font for a character; None if that font is installed and does not hold it."""
    name, code = unicodedata.name(sign, ""), ord(sign)
    if 0x20000 <= code < 0x40000 or any(word in name for word in CJK_NAMES):
        if not _packaged_families():
            return f"pip install {CJK_PIN}"
        package, family = RARE_CJK_PACKAGE
    elif unicodedata.category(sign).startswith("S") or 0x1F000 <= code < 0x20000:
        package, family = SYMBOL_PACKAGE
    else:
        package, family = SCRIPT_PACKAGE
    return None if family in _known_families() else f"apt-get install {package}"


def _held(family: str, signs: set[str]) -> set[str]:
    """Those of the characters that a family's regular face holds."""
    from matplotlib import font_manager

    with quiet_fonts():  # a family without a regular face: the nearest will do
        font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[family])))
    return {c for c in signs if font.get_char_index(ord(c))}


@contextlib.contextmanager
def quiet_fonts() -> Iterator[None]:
    """Without matplotlib's warnings per text and character: `fonts_for` says once what matters."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            yield
    finally:
        log.setLevel(level)


def absent_fonts(wanted: Sequence[str]) -> list[str]:
    """Those of these families and font files that do not exist here."""
    return [name for name in wanted if not (Path(name).is_file() if _is_file_name(name) else name in _known_families())]


def _is_file_name(name: str) -> bool:
    return Path(name).suffix.lower() in (".ttf", ".ttc", ".otf")


def _wanted_families(wanted: Sequence[str]) -> Iterator[str]:
    """The families named by the user; unusable font files are skipped with a warning."""
    absent = absent_fonts(wanted)
    for name in wanted:
        if name in absent:
            continue
        if not _is_file_name(name):
            yield name
            continue
        try:
            yield from _added(Path(name))
        except UNUSABLE as error:
            logger.warning(
                "字体不可用 font file %s cannot be used (%s); name another one in chinese_fonts", name, error
            )


def _known_families() -> set[str]:
    from matplotlib.font_manager import fontManager

    # "Last Resort" has a box for every character
    return {font.name for font in fontManager.ttflist if not font.name.startswith("Last Resort")}


def _system_families() -> list[str]:
    return _for_chinese(_known_families() - {LATIN})


def _new_families() -> list[str]:
    """Families of fonts installed after matplotlib made its list of the system's fonts."""
    from matplotlib import font_manager

    known = {font.fname for font in font_manager.fontManager.ttflist}
    found = []
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        with contextlib.suppress(*UNUSABLE):  # coloured bitmaps, for example
            found += _added(Path(path))
    return _for_chinese(dict.fromkeys(found))


def _for_chinese(families: Iterable[str]) -> list[str]:
    """Families made for simplified Chinese first: others draw some characters the Japanese way."""
    return sorted(families, key=lambda f: ("Mono" in f, not any(hint in f for hint in SIMPLIFIED), f))


def _packaged_families() -> list[str]:
    """Families of the font in a PyPI package, found without importing the package."""
    try:
        files = metadata.files(CJK_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    found = [Path(str(file.locate())) for file in files if _is_file_name(file.name)]
    added = [family for path in found if path.is_file() for family in _added(path)]
    return sorted(added, key=lambda f: ("Mono" in f, "SC" not in f))


def _added(path: Path) -> list[str]:
    """Families of a font file, made known to matplotlib."""
    from matplotlib.font_manager import fontManager

    if not any(Path(font.fname) == path for font in fontManager.ttflist):
        fontManager.addfont(path)
    return list(dict.fromkeys(font.name for font in fontManager.ttflist if Path(font.fname) == path))
