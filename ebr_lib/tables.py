"""One small table that a log line, a terminal and a notebook can all show."""

from __future__ import annotations

import base64
import html
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEFT = ' style="text-align:left"'  # for texts: a notebook puts all cells to the right
WHOLE = ' style="text-align:left;white-space:nowrap"'  # for short ones, which it would break between two signs
SHORT = 24  # half-width columns
MIME = {".png": "image/png", ".svg": "image/svg+xml"}  # pictures that a notebook shows by itself
_NUMBER = re.compile(r"([+-]?\d[\d.,]*(?=[ %]|$)|$)")
LONGEST = 200  # characters of either end of a text that `squeezed` looks at


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _alignment(column: Sequence[str]) -> str:
    if all(map(_NUMBER.match, column)):
        return ""
    return WHOLE if max(map(columns_of, column)) <= SHORT else LEFT


def _html_row(tag: str, cells: Iterable[str], aligned: Sequence[str]) -> str:
    shown = (f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell, style in zip(cells, aligned, strict=True))
    return f"<tr>{''.join(shown)}</tr>"


def html_link(path: Path) -> str:
    """A paragraph that opens a file from a notebook of the folder in which the program runs."""
    link = html.escape(os.path.relpath(path), quote=True)
    return f'<p><a href="{link}" target="_blank">{link}</a></p>'


def html_picture(path: Path, alt: str) -> str:
    """The picture itself, where it is there and a notebook shows its kind; else a link to it."""
    kind = MIME.get(path.suffix.lower())
    if kind is None or not path.is_file():
        return html_link(path)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img style="max-width:100%" alt="{alt}" src="data:{kind};base64,{data}">'


def columns_of(text: str) -> int:
    """Width in half-width columns: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shortened(text: str, columns: int = 40) -> str:
    """A text on one line, cut to so many half-width columns."""
    text = " ".join(text.split())
    if columns_of(text[: columns + 1]) <= columns:
        return text
    text = text[:columns]
    while columns_of(text) > columns - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def squeezed(text: str, most: float, width_of: Callable[[str], float] = columns_of) -> str:
    """A label on one line, cut in its middle: labels that begin alike often end apart.

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


class Shown:
    """What a stage returns: as text and in a notebook it is its table, or its own, and not every field of it."""

    def __str__(self) -> str:
        return str(self.table)  # type: ignore[attr-defined] # a field of every result

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.table.html()  # type: ignore[attr-defined]


@dataclass(frozen=True, repr=False)
class Table(Shown):
    """A titled table; cells are shown with `str`, floats with four decimals.

    :param widths: to how many half-width columns a column's texts are cut where they are shown; `rows` has them whole.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    widths: Mapping[str, int] = field(default_factory=dict)

    def _shown(self) -> list[list[str]]:
        """The cells as text."""
        return [[self._fitted(c, v) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]

    def _fitted(self, column: str, value: Any) -> str:
        text = _cell(value)
        return squeezed(text, self.widths[column]) if column in self.widths else text

    def text(self) -> str:
        """Columns aligned by spaces, for logs and terminals."""
        lines = [list(self.columns), *self._shown()]
        widths = [max(columns_of(line[i]) for line in lines) for i in range(len(self.columns))]
        shown = (
            "  ".join(c + " " * (w - columns_of(c)) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return "\n".join([self.title, *shown]).rstrip()

    def html(self) -> str:
        """An HTML table; every cell is escaped, for cells hold users' texts."""
        rows = self._shown()
        aligned = [_alignment(column) for column in zip(*rows, strict=True)]
        head = _html_row("th", map(str, self.columns), aligned or [LEFT] * len(self.columns))
        body = "".join(_html_row("td", row, aligned) for row in rows)
        return f"<b>{html.escape(self.title)}</b><table><thead>{head}</thead><tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return self.html()
