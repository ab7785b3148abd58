"""Tables of results: pandas DataFrames with a title, as text for logs and as HTML for notebooks."""

from __future__ import annotations

import base64
import html
import itertools
import math
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

MIME = {".png": "image/png", ".svg": "image/svg+xml"}  # pictures that a notebook shows by itself
SHORT = 24  # half-width columns: a notebook would break longer texts into lines, and these need not be
LARGEST_PAGE = 2 << 20  # bytes of a page that is shown in a notebook, whose file would hold it
NARROWEST = 10  # columns that a text gets in a narrow terminal
BOLD, RED, YELLOW, GREEN = "1", "31", "33", "32"
LONGEST = 200  # characters of either end of a text that `squeezed` looks at
_NUMBER = re.compile(r"([+-]?\d[\d.,]*(?=[ %]|$)|$)")


def make_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], width: int | None = None
) -> DataFrame:
    """A DataFrame that knows its title.

    :param width: half-width columns to which texts are cut where the table is shown; the frame has them whole.
    """
    import pandas as pd

    frame = pd.DataFrame(list(rows), columns=list(columns))
    frame.attrs |= {"title": title, "width": width}
    return frame


def as_text(table: DataFrame, width: int | None = None) -> str:
    """Title and table for logs and terminals: numbers right, texts left.

    :param width: half-width columns that it may take; texts are wrapped to fit. None takes the terminal's, if there is
        one, and has no limit otherwise.
    """
    import pandas as pd

    width = width or terminal_width()
    title, shown = table.attrs.get("title", ""), _as_shown(table)
    cells = pd.DataFrame([shown.columns, *shown.to_numpy()])  # the head is padded like the cells below it
    texts = [place for place, name in enumerate(shown) if not _holds_numbers(shown[name])]
    if width:
        cells, title = _fitted(cells, texts, width), wrapped(title, width)
    for place in texts:
        most = cells[place].map(columns_of).max()
        cells[place] = [text + " " * (most - columns_of(text)) for text in cells[place]]
    with pd.option_context("display.unicode.east_asian_width", True):
        lines = cells.map("{} ".format).to_string(index=False, header=False) if len(shown.columns) else ""
    return "\n".join([styled(title, BOLD), *map(str.rstrip, lines.split("\n"))]).rstrip()


def _fitted(cells: DataFrame, texts: Sequence[int], width: int) -> DataFrame:
    """The cells with texts wrapped, so that rows fit a width: the widest columns give first, down to `NARROWEST`."""
    import pandas as pd

    widths = [int(cells[place].map(columns_of).max()) for place in cells]
    while sum(widths) + 2 * len(widths) > width and any(widths[place] > NARROWEST for place in texts):
        widths[max(texts, key=lambda place: widths[place])] -= 1
    rows: list[tuple[str, ...]] = []
    for row in cells.to_numpy():
        columns = [wrapped(cell, most).split("\n") if place in texts else [cell]
                   for place, (cell, most) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        rows += itertools.zip_longest(*columns, fillvalue="")
    return pd.DataFrame(rows)


def terminal_width() -> int | None:
    """Columns of the terminal that standard output goes to; None for a file, a pipe or a notebook."""
    return shutil.get_terminal_size().columns if _is_terminal() else None


def styled(text: str, style: str) -> str:
    """A text in bold or in a colour, where a terminal shows it and NO_COLOR does not forbid it."""
    plain = not _is_terminal() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain or not text else f"\x1b[{style}m{text}\x1b[0m"


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def as_html(table: DataFrame) -> str:
    """A Styler's HTML for notebooks: numbers right, texts left, no index. Escaped, for cells hold users' texts."""
    shown = _as_shown(table)
    texts = {name: shown[name] for name in shown if not _holds_numbers(shown[name])}
    styles = {
        name: [
            {"selector": "", "props": "text-align: left" + ("; white-space: nowrap" if _is_short(texts[name]) else "")}
        ]
        for name in texts
    }
    style = shown.style.format(escape="html").format_index(escape="html", axis="columns").hide(axis="index")
    style.set_caption(html.escape(table.attrs.get("title", "")))
    style.set_table_styles([{"selector": "caption", "props": "text-align: left; font-weight: bold"}])
    return str(style.set_table_styles(styles, overwrite=False).to_html())


def _as_shown(table: DataFrame) -> DataFrame:
    """The cells as texts: nulls are empty, and long texts cut where the table says so."""
    shown = table.map(_cell)
    if "change" in shown and table["change"].dtype.kind == "f":
        shown["change"] = table["change"].map("{:+.4f}".format)
    width = table.attrs.get("width")
    return shown.map(lambda text: squeezed(text, width)) if width else shown


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _holds_numbers(column: Iterable[str]) -> bool:
    return all(map(_NUMBER.match, column))


def _is_short(column: Iterable[str]) -> bool:
    return max(map(columns_of, column), default=0) <= SHORT


class TableRepr:
    """A result that shows itself as the first of its tables, in a terminal and in a notebook."""

    tables: Mapping[str, DataFrame]

    def __repr__(self) -> str:
        return as_text(next(iter(self.tables.values())))

    def _repr_html_(self) -> str:
        return as_html(next(iter(self.tables.values())))


def html_link(path: Path) -> str:
    """A paragraph that opens a file from a notebook of the folder in which the program runs."""
    link = _address(path)
    return f'<p><a href="{link}" target="_blank">{link}</a></p>'


def _address(path: Path) -> str:
    return html.escape(os.path.relpath(path), quote=True)


def html_verdict(sentence: str, notes: Iterable[str] = (), of: str = "") -> str:
    """A result in one sentence, what it is about before it, and below it what speaks against it."""
    head = f"<small>{html.escape(of)}</small><br>" if of else ""
    below = "".join(f'<p style="margin:.2em 0">⚠ {html.escape(note)}</p>' for note in notes)
    return f'<p style="margin:.4em 0">{head}<b style="font-size:1.15em">{html.escape(sentence)}</b></p>{below}'


def html_folded(tables: Iterable[DataFrame], title: str) -> str:
    """Tables that open with a click, so that a stage's output fits a screen."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(map(as_html, tables))}</details>"


def html_page(path: Path, name: str, height: int = 600) -> str:
    """A link to a page, and the page itself, folded, in a frame that needs no server: JupyterLab's own viewer shows a
    linked page without its scripts, and VS Code opens no link from a notebook.

    A notebook that is not trusted drops the frame; a page too large for a notebook is only linked.
    """
    if not path.is_file() or path.stat().st_size > LARGEST_PAGE:
        return html_link(path)
    page = html.escape(path.read_text(encoding="utf-8"), quote=True)
    # without the notebook's origin, so that a page that holds users' texts reaches nothing of it
    allowed = 'sandbox="allow-scripts allow-downloads allow-popups" allow="clipboard-write; fullscreen"'
    frame = f'<iframe {allowed} style="width:100%;height:{height}px;border:0" srcdoc="{page}"></iframe>'
    note = "空白时请信任该 notebook blank? trust the notebook, or open the file"
    return (
        f"<details><summary>{html.escape(name)} · 点击展开 open here</summary><small>{note}</small>{frame}</details>"
        f"{html_link(path)}"
    )


def html_picture(path: Path, alt: str, height: int | None = None) -> str:
    """The picture itself, if it is there and a notebook shows its kind; otherwise a link to it.

    :param height: pixels that it takes at most; a click then opens the file.
    """
    kind = MIME.get(path.suffix.lower())
    if kind is None or not path.is_file():
        return html_link(path)
    data = base64.b64encode(path.read_bytes()).decode()
    most = f";max-height:{height}px" if height else ""
    shown = f'<img style="max-width:100%{most}" alt="{alt}" src="data:{kind};base64,{data}">'
    return (
        f'<a href="{_address(path)}" target="_blank" title="点击看原图 open the file">{shown}</a>' if height else shown
    )


def columns_of(text: str) -> int:
    """Width in half-width columns: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shortened(text: str, columns: int = 40) -> str:
    """A text on one line, cut at its end to a number of half-width columns."""
    text = " ".join(text.split())
    if columns_of(text[: columns + 1]) <= columns:
        return text
    text = text[:columns]
    while columns_of(text) > columns - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def squeezed(text: str, most: float, width_of: Callable[[str], float] = columns_of) -> str:
    """A text on one line, cut in its middle: labels that begin alike often end apart.

    :param most: width it may take, as `width_of` measures it.
    """
    text = " ".join(text.split())
    if width_of(text) <= most:
        return text
    tail = text[-LONGEST:]
    while width_of(tail) > most / 3:
        tail = tail[1:]
    head = text[:LONGEST]
    while head and width_of(f"{head.rstrip()}…{tail}") > most:
        head = head[:-1]
    return f"{head.rstrip()}…{tail}"


def wrapped(text: str, most: float, width_of: Callable[[str], float] = columns_of) -> str:
    """Break a text into lines of a width: at spaces, inside longer words, and inside Chinese ones of half of it."""
    return "\n".join(_wrapped_line(line, most, width_of) for line in text.split("\n"))


def _wrapped_line(text: str, most: float, width_of: Callable[[str], float]) -> str:
    lines, line = [], ""
    for word in text.split(" "):
        pieces = list(word) if width_of(word) > (most if word.isascii() else most / 2) else [word]
        for i, piece in enumerate(pieces):
            joined = f"{line} {piece}" if line and i == 0 else line + piece
            if line and width_of(joined) > most:
                lines.append(line)
                joined = piece
            line = joined
    return "\n".join([*lines, line])
