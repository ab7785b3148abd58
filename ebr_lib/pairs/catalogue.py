"""Texts of items, from a catalogue of any size: only those that are needed are held."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ebr_lib.errors import DataError
from ebr_lib.pairs.choose import TEXT
from ebr_lib.pairs.rows import ITEM, ITEM_IDS
from ebr_lib.pairs.sources import Table

if TYPE_CHECKING:
    import polars as pl

IDS = ("item_id", "id", "_id", *ITEM_IDS[1:])
_PART = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Catalogue:
    """Items and their texts: lazy columns `ITEM` and `TEXT`; items without a text are left out."""

    place: str
    frame: pl.LazyFrame

    def texts(self, ids: pl.DataFrame) -> pl.DataFrame:
        """The texts of the items that `ids` names.

        :raises DataError: an id has two texts.
        """
        found = self.frame.join(ids.lazy().select(ITEM).unique(), on=ITEM, how="semi")
        frame = found.unique().collect(engine="streaming").sort(ITEM, TEXT)
        self._check_once(frame)
        return frame

    def write_corpus(self, place: Path) -> int:
        """Write all items as BEIR's `corpus.jsonl`, in order of their ids; returns how many.

        :raises DataError: an id has two texts.
        """
        import polars as pl

        frame = self.frame.unique().sort(ITEM, TEXT)
        rows = frame.select(pl.col(ITEM).alias("_id"), pl.col(TEXT).alias("text"))
        rows.sink_ndjson(place)
        written = pl.scan_ndjson(place, schema={"_id": pl.String, "text": pl.String}).select(
            pl.len(), pl.col("_id").n_unique().alias("ids")
        )
        count, ids = written.collect(engine="streaming").row(0)
        if ids < count:
            twice = frame.filter(pl.col(ITEM).is_duplicated()).head(2).collect()
            self._check_once(twice)
        return int(count)

    def examples(self) -> list[str]:
        """Some ids."""
        return self.frame.select(ITEM).head(3).collect()[ITEM].to_list()

    def _check_once(self, frame: pl.DataFrame) -> None:
        import polars as pl

        twice = frame.filter(pl.col(ITEM).is_duplicated())
        if len(twice):
            id_, texts = twice[ITEM][0], twice.filter(pl.col(ITEM) == twice[ITEM][0])[TEXT].to_list()
            raise DataError(
                f"catalogue {self.place}: {twice[ITEM].n_unique()} ids have two texts, such as {id_} "
                f"({texts[0][:40]!r} and {texts[1][:40]!r}); give one snapshot, such as its last partition"
            )


def open_catalogue(table: Table, id_column: str | None, template: str) -> Catalogue:
    """The catalogue of a table.

    :param template: columns in braces, and what is between them.
    :raises DataError: a column is missing.
    """
    import polars as pl

    name = table.some(id_column, IDS, "id_column")
    columns = [table.need(column, "text_template") for column in _PART.findall(template)]
    frame = table.scan(list(dict.fromkeys([name, *columns])))
    text = _filled(template, columns).str.replace_all(r"\s+", " ").str.strip_chars(" ")
    rows = frame.select(pl.col(name).str.strip_chars().alias(ITEM), text.alias(TEXT))
    shown = pl.col(TEXT).str.replace_all("[\u200b-\u200f\u2060\ufeff]", "") != ""
    return Catalogue(table.place, rows.filter((pl.col(ITEM) != "") & shown))


def _filled(template: str, columns: Sequence[str]) -> pl.Expr:
    """The template with an item's values; nulls are empty."""
    import polars as pl

    between = _PART.split(template)[::2]
    values = [pl.col(column).cast(pl.String).fill_null("") for column in columns]
    parts: list[pl.Expr] = [pl.lit(between[0])]
    for value, text in zip(values, between[1:], strict=True):
        parts += [value, pl.lit(text)]
    return pl.concat_str(parts)
