"""Texts of items, from a catalogue of any size: only those that are needed are held."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ebr_lib.errors import DataError
from ebr_lib.pairs.columns import CATALOGUE_IDS, ITEM, TEXT
from ebr_lib.pairs.sources import Table

_PART = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Catalogue:
    """Items and their texts: lazy columns `ITEM` and `TEXT`; items without a text are left out."""

    place: str
    frame: pl.LazyFrame

    def texts(self, ids: pl.Series) -> pl.DataFrame:
        """The texts of the items that are named.

        :raises DataError: an id has two texts.
        """
        found = self.frame.join(ids.unique().to_frame(ITEM).lazy(), on=ITEM, how="semi")
        frame = found.unique().collect(engine="streaming").sort(ITEM, TEXT)
        self._check_once(frame)
        return frame

    def write_corpus(self, place: Path) -> None:
        """Write all items as BEIR's `corpus.jsonl`, in order of their ids.

        :raises DataError: an id has two texts.
        """
        frame = self.frame.unique().sort(ITEM, TEXT)
        frame.select(pl.col(ITEM).alias("_id"), pl.col(TEXT).alias("text")).sink_ndjson(place)
        ids = pl.col("_id")
        written = pl.scan_ndjson(place, schema={"_id": pl.String, "text": pl.String})
        if written.select(ids.n_unique() < ids.len()).collect(engine="streaming").item():
            self._check_once(frame.filter(pl.col(ITEM).is_duplicated()).head(2).collect())

    def _check_once(self, frame: pl.DataFrame) -> None:
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
    id_ = table.need(id_column, CATALOGUE_IDS, "id_column")
    columns = [table.need(name, (), "text_template") for name in _PART.findall(template)]
    parts = _PART.split(template)  # what is between the columns, and they themselves, in turn
    values = [pl.col(part).fill_null("") if place % 2 else pl.lit(part) for place, part in enumerate(parts)]
    text = pl.concat_str(values).str.replace_all(r"\s+", " ").str.strip_chars(" ")
    frame = table.scan(list(dict.fromkeys([id_, *columns])))
    rows = frame.select(pl.col(id_).str.strip_chars().alias(ITEM), text.alias(TEXT))
    shown = pl.col(TEXT).str.replace_all("[\u200b-\u200f\u2060\ufeff]", "") != ""
    return Catalogue(table.place, rows.filter((pl.col(ITEM) != "") & shown))
