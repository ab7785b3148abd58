"""Tables of results: pandas DataFrames with a title, as text for logs and as HTML for notebooks."""

from __future__ import annotations

import base64
import html
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

MIME = {".png": "image/png", ".svg": "image/svg+xml"}  # pictures that a notebook shows by itself
SHORT = 24  # half-width columns: a notebook would break longer texts into lines, and these need not be
LARGEST_PAGE = 2 << 20  # bytes of a page that is shown in a notebook, whose file would hold it
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


def as_text(table: DataFrame) -> str:
    """Title and table for logs and terminals: numbers right, texts left."""
    import pandas as pd

    title, shown = table.attrs.get("title", ""), _as_shown(table)
    cells = pd.DataFrame([shown.columns, *shown.to_numpy()])  # the head is padded like the cells below it
    for place, name in enumerate(shown):
        if not _holds_numbers(shown[name]):
            width = cells[place].map(columns_of).max()
            cells[place] = [text + " " * (width - columns_of(text)) for text in cells[place]]
    with pd.option_context("display.unicode.east_asian_width", True):
        lines = cells.map("{} ".format).to_string(index=False, header=False) if len(shown.columns) else ""
    return "\n".join([title, *map(str.rstrip, lines.split("\n"))]).rstrip()


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
    link = html.escape(os.path.relpath(path), quote=True)
    return f'<p><a href="{link}" target="_blank">{link}</a></p>'


def html_verdict(sentence: str, notes: Iterable[str] = (), of: str = "") -> str:
    """A result in one sentence, what it is about before it, and below it what speaks against it."""
    head = f"<small>{html.escape(of)}</small><br>" if of else ""
    below = "".join(f'<p style="margin:.2em 0">⚠ {html.escape(note)}</p>' for note in notes)
    return f'<p style="margin:.4em 0">{head}<b style="font-size:1.15em">{html.escape(sentence)}</b></p>{below}'


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


def html_picture(path: Path, alt: str) -> str:
    """The picture itself, if it is there and a notebook shows its kind; otherwise a link to it."""
    kind = MIME.get(path.suffix.lower())
    if kind is None or not path.is_file():
        return html_link(path)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img style="max-width:100%" alt="{alt}" src="data:{kind};base64,{data}">'


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
