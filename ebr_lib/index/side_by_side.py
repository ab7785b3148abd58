"""Several indexes searched for the same queries, side by side: the base model beside the fine-tuned one."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.data.queries import DOCUMENT_IDS, read_queries
from ebr_lib.errors import UserError
from ebr_lib.index import store
from ebr_lib.index.config import IndexConfig
from ebr_lib.index.opened import open_index
from ebr_lib.index.search import SearchResult, search
from ebr_lib.model.provenance import Provenance
from ebr_lib.tables import TableRepr, make_table, shortened

if TYPE_CHECKING:
    from pandas import DataFrame

EXAMPLES = 5  # queries taken from the data where none are given
TITLES = ("title", "name", "标题", "名称")  # columns that name an item, before the text that was encoded

Indexes = str | Path | Mapping[str, str | Path]
"""An index folder, or several by the names that are shown."""


@dataclass(frozen=True, repr=False)
class SideBySide(TableRepr):
    """What each index found for each query. `tables` has `found`: one row per query and rank."""

    answers: Mapping[str, Mapping[str, SearchResult]]
    tables: dict[str, DataFrame] = field(compare=False)

    def _repr_html_(self) -> str:
        return as_columns(self.answers)


def search_examples(indexes: Indexes, queries: Sequence[str] = (), k: int = 3, **knobs: Any) -> SideBySide:
    """Search each index for each query.

    :param queries: without any, the first five of the queries that the first index was measured with, or else the texts
        of its first rows.
    :param knobs: those of `search`, such as `where` and `trust_remote_code`.
    :raises UserError: as `search` does.
    """
    folders = _named(indexes)
    asked = list(queries) or usual_queries(next(iter(folders.values())))
    answers = {q: {name: search(folder, q, k, **knobs) for name, folder in folders.items()} for q in asked}
    rows = [
        (query, rank, *(_line(found, rank - 1) for found in by_index.values()))
        for query, by_index in answers.items()
        for rank in range(1, k + 1)
    ]
    heads = _heads(next(iter(answers.values()), {})) or list(folders)
    table = make_table("检索 search", ("query", "rank", *heads), rows, width=48)
    return SideBySide(answers, {"found": table})


def search_box(indexes: Indexes, k: int = 5, **knobs: Any) -> Any:
    """A widget with an input box that searches the indexes, for a notebook with a live kernel.

    :param knobs: those of `search`.
    :returns: the widget, or without ipywidgets how to get it.
    """
    try:
        import ipywidgets
    except ImportError:
        return "检索框需要 ipywidgets the search box needs it: pip install ipywidgets"

    folders = _named(indexes)
    text = ipywidgets.Text(placeholder="输入查询后回车 type a query, press Enter", layout={"width": "32em"})
    button, shown = ipywidgets.Button(description="检索 search"), ipywidgets.HTML()

    def answer(_: Any) -> None:
        if not text.value.strip():
            return
        try:
            found = {name: search(folder, text.value, k, **knobs) for name, folder in folders.items()}
        except UserError as error:
            shown.value = f"<p>{html.escape(str(error))}</p>"
        else:
            shown.value = as_columns({text.value: found})

    button.on_click(answer)
    text.continuous_update = False  # else every letter would search
    text.observe(answer, "value")
    return ipywidgets.VBox([ipywidgets.HBox([text, button]), shown])


def as_columns(answers: Mapping[str, Mapping[str, SearchResult]]) -> str:
    """HTML: a row per query, a column per index. Escaped, for they hold users' texts."""
    names = _heads(next(iter(answers.values()), {}))
    head = "".join(f'<th style="text-align:left">{html.escape(name)}</th>' for name in ("", *names))
    body = "".join(
        f'<tr><td style="text-align:left;vertical-align:top"><b>{html.escape(query)}</b></td>'
        + "".join(_cell(found) for found in by_index.values())
        + "</tr>"
        for query, by_index in answers.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _heads(by_index: Mapping[str, SearchResult]) -> list[str]:
    """The names of the indexes, and what their rows are ordered by if not by the score."""
    return [" · ".join(filter(None, (name, found.attrs["order"]))) for name, found in by_index.items()]


def _cell(found: SearchResult) -> str:
    items = "".join(f"<li>{html.escape(_line(found, place))}</li>" for place in range(len(found)))
    return f'<td style="text-align:left;vertical-align:top"><ol style="margin:0">{items}</ol></td>'


def _line(found: SearchResult, place: int) -> str:
    """An item on one line: score, title or text, id."""
    if place >= len(found):
        return ""
    row = found.iloc[place]
    shown = next((name for name in (*TITLES, found.attrs["text_column"]) if name in found), None)
    ids = next((name for name in (*DOCUMENT_IDS, "item_id", "sku") if name in found and name != shown), None)
    texts = [shortened(str(row[name]), 44) for name in (shown, ids) if name is not None and row[name] is not None]
    return f"{row['score']:.3f} {' · '.join(texts) or found.index[place]}"


def usual_queries(folder: str | Path, most: int = EXAMPLES) -> list[str]:
    """Queries at hand: those that the index was measured with, or else the texts of its first rows."""
    config = IndexConfig.resolve({"preset": str(store.place_of(Path(folder), store.CONFIG_FILE))})
    if config.queries_path and Path(config.queries_path).is_file():
        return read_queries(Path(config.queries_path), config.query_column)[:most]
    held = open_index(folder)
    encoded = Provenance.of(held.manifest).description_column
    column = next((name for name in (*TITLES, encoded) if name in held.columns), held.columns[-1])
    texts = held.first_texts(column, 20 * most)
    return [shortened(text, 60) for text in dict.fromkeys(texts) if text and text.strip()][:most]


def _named(indexes: Indexes) -> dict[str, str | Path]:
    return dict(indexes) if isinstance(indexes, Mapping) else {str(indexes): indexes}
