"""Files of the stage: training pairs, the held-out folder, rejects, presets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ebr_lib.names import CORPUS_FILE, QUERIES_FILE
from ebr_lib.pairs.choose import CLICKS, GRADE, IMPRESSIONS, TEXT, WEIGHT
from ebr_lib.pairs.rows import ITEM, KEY

if TYPE_CHECKING:
    import polars as pl

    from ebr_lib.pairs.catalogue import Catalogue

PAIRS_FILE, REJECTS_FILE, MANIFEST_FILE = "pairs.jsonl", "rejects.jsonl", "manifest.json"
CONFIG_FILE, HTML_FILE, SQL_FILE = "pairs_config.yaml", "report.html", "aggregate.sql"
FINETUNE_PRESET, EVALUATE_PRESET = "finetune.yaml", "evaluate.yaml"
HELDOUT_FOLDER, QRELS_FILE = "heldout", "qrels/test.tsv"
HELDOUT_FILES = (CORPUS_FILE, QUERIES_FILE, QRELS_FILE, PAIRS_FILE)
FILES = (PAIRS_FILE, REJECTS_FILE, MANIFEST_FILE, CONFIG_FILE, HTML_FILE, SQL_FILE, FINETUNE_PRESET, EVALUATE_PRESET)
ANCHOR, ANCHOR_ID, QUERY_SEEN, ITEMS_SEEN = "anchor", "anchor_id", "query_seen", "items_seen"


def is_own(name: str) -> bool:
    """Whether the stage writes a file or folder of this name into its output folder."""
    return name in (*FILES, HELDOUT_FOLDER)


def write_pairs(place: Path, pairs: pl.DataFrame, *, anchor_ids: bool) -> None:
    """Write one line per pair: anchor, positive, weight, its ids and counts, and negatives if it has any."""
    with place.open("w", encoding="utf-8", newline="\n") as out:
        for row in pairs.iter_rows(named=True):
            line = {
                "anchor": row[ANCHOR],
                "positive": row[TEXT],
                "weight": float(f"{row[WEIGHT]:.4g}"),
                **({ANCHOR_ID: row[KEY]} if anchor_ids else {}),
                "item_id": row[ITEM],
                "impressions": row[IMPRESSIONS],
                "clicks": row[CLICKS],
            }
            if row.get("negative"):
                line["negative"] = row["negative"]
            out.write(_json(line))


def write_heldout(folder: Path, queries: pl.DataFrame, pairs: pl.DataFrame, catalogue: Catalogue) -> None:
    """Write held-out queries as a BEIR folder, and as pairs for the evaluation during fine-tuning.

    :param queries: `KEY`, anchor, `query_seen` and `items_seen`, one row per query; their ids are q1, q2 … in order.
    """
    (folder / QRELS_FILE).parent.mkdir(parents=True)
    catalogue.write_corpus(folder / CORPUS_FILE)
    answers = {key: rows for (key,), rows in pairs.sort(KEY, ITEM).group_by([KEY], maintain_order=True)}
    with (
        (folder / QUERIES_FILE).open("w", encoding="utf-8", newline="\n") as texts,
        (folder / QRELS_FILE).open("w", encoding="utf-8", newline="\n") as grades,
        (folder / PAIRS_FILE).open("w", encoding="utf-8", newline="\n") as rows,
    ):
        grades.write("query-id\tcorpus-id\tscore\n")
        for number, query in enumerate(queries.iter_rows(named=True), 1):
            seen = {name: query[name] for name in (QUERY_SEEN, ITEMS_SEEN)}
            texts.write(_json({"_id": f"q{number}", "text": query[ANCHOR]} | seen))
            of_query = answers[query[KEY]]
            rows.write(_json({"anchor": query[ANCHOR], "positive": of_query[TEXT].to_list()}))
            for item, grade in of_query.select(ITEM, GRADE).iter_rows():
                grades.write(f"q{number}\t{item}\t{grade}\n")


def write_rejects(place: Path, rows: Iterable[pl.LazyFrame], pairs: pl.DataFrame) -> int:
    """Write rows that cannot be used, then pairs whose item has no text in the catalogue; returns how many."""
    count = 0
    with place.open("w", encoding="utf-8", newline="\n") as out:
        for frame in rows:
            for batch in frame.collect(engine="streaming").iter_slices(10_000):
                count += len(batch)
                out.writelines(_json(row) for row in batch.iter_rows(named=True))
        for row in pairs.iter_rows(named=True):
            count += 1
            out.write(_json(row))
    return count


def write_presets(folder: Path, final: Path, *, with_heldout: bool) -> None:
    """Write presets of fine-tuning and evaluation that read exactly these files.

    :param final: where the folder will be when it is whole.
    """
    finetune: dict[str, Any] = {"data_path": str(final / PAIRS_FILE)}
    if with_heldout:
        finetune["eval_data_path"] = str(final / HELDOUT_FOLDER / PAIRS_FILE)
        evaluate = {
            "data_path": str(final / HELDOUT_FOLDER),
            "train_data_path": str(final / PAIRS_FILE),
            "slice_columns": [QUERY_SEEN, ITEMS_SEEN],
            "leave_out_own": "text",  # queries are numbered apart from items
        }
        _write_preset(folder / EVALUATE_PRESET, "evaluate", final / EVALUATE_PRESET, evaluate)
    _write_preset(folder / FINETUNE_PRESET, "finetune", final / FINETUNE_PRESET, finetune)


def _write_preset(place: Path, stage: str, final: Path, knobs: Mapping[str, Any]) -> None:
    command = f"# python -m ebr_lib {stage} --config {final}\n"
    place.write_text(command + yaml.safe_dump(dict(knobs), allow_unicode=True, sort_keys=False), encoding="utf-8")


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
