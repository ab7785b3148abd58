"""One small table that a log line, a terminal and a notebook can all show."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


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
    """A titled table; cells are shown with `str`, floats with four decimals."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def text(self) -> str:
        """Columns aligned by spaces, for logs and terminals."""
        lines = [list(self.columns), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(columns_of(line[i]) for line in lines) for i in range(len(self.columns))]
        shown = (
            "  ".join(c + " " * (w - columns_of(c)) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return "\n".join([self.title, *shown]).rstrip()

    def html(self) -> str:
        """An HTML table; every cell is escaped, for cells hold users' texts."""
        head = "".join(f"<th>{html.escape(str(c))}</th>" for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(v))}</td>" for v in row) + "</tr>" for row in self.rows
        )
        return f"<b>{html.escape(self.title)}</b><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return self.html()
