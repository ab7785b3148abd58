"""Files of the stage: training pairs, the held-out folder, rejects, presets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ebr_lib.names import CORPUS_FILE, QUERIES_FILE
from ebr_lib.pairs.columns import (
    ANCHOR,
    CLICKS,
    GRADE,
    IMPRESSIONS,
    ITEM,
    ITEMS_SEEN,
    KEY,
    QUERY_SEEN,
    TEXT,
    WEIGHT,
)  # fmt: skip

PAIRS_FILE, REJECTS_FILE, MANIFEST_FILE = "pairs.jsonl", "rejects.jsonl", "manifest.json"
CONFIG_FILE, HTML_FILE, SQL_FILE = "pairs_config.yaml", "report.html", "aggregate.sql"
FINETUNE_PRESET, EVALUATE_PRESET = "finetune.yaml", "evaluate.yaml"
HELDOUT_FOLDER, QRELS_FILE = "heldout", "qrels/test.tsv"
HELDOUT_FILES = (CORPUS_FILE, QUERIES_FILE, QRELS_FILE, PAIRS_FILE)
FILES = (PAIRS_FILE, REJECTS_FILE, MANIFEST_FILE, CONFIG_FILE, HTML_FILE, SQL_FILE, FINETUNE_PRESET, EVALUATE_PRESET)


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
                **({"anchor_id": row[KEY]} if anchor_ids else {}),
                "item_id": row[ITEM],
                "impressions": row[IMPRESSIONS],
                "clicks": row[CLICKS],
                **({"negative": row["negative"]} if row.get("negative") else {}),
            }
            out.write(_json(line))


def write_heldout(folder: Path, queries: pl.DataFrame, pairs: pl.DataFrame) -> None:
    """Write held-out queries in BEIR's layout, and as pairs for the evaluation during fine-tuning.

    :param queries: `KEY`, anchor, `query_seen` and `items_seen`, one row per query; their ids are q1, q2 … in order.
    """
    (folder / QRELS_FILE).parent.mkdir(parents=True)
    answers = {key: rows for (key,), rows in pairs.sort(KEY, ITEM).group_by([KEY], maintain_order=True)}
    with (
        (folder / QUERIES_FILE).open("w", encoding="utf-8", newline="\n") as texts,
        (folder / QRELS_FILE).open("w", encoding="utf-8", newline="\n") as grades,
        (folder / PAIRS_FILE).open("w", encoding="utf-8", newline="\n") as rows,
    ):
        grades.write("query-id\tcorpus-id\tscore\n")
        for number, (key, anchor, query_seen, items_seen) in enumerate(queries.iter_rows(), 1):
            id_ = f"q{number}"
            texts.write(_json({"_id": id_, "text": anchor, QUERY_SEEN: query_seen, ITEMS_SEEN: items_seen}))
            rows.write(_json({"anchor": anchor, "positive": answers[key][TEXT].to_list()}))
            grades.writelines(
                f"{id_}\t{item}\t{grade}\n" for item, grade in answers[key].select(ITEM, GRADE).iter_rows()
            )


def write_rejects(place: Path, rows: Iterable[pl.LazyFrame], pairs: pl.DataFrame) -> int:
    """Write rows that cannot be used, then pairs whose item has no text in the catalogue; returns how many."""
    count = 0
    with place.open("w", encoding="utf-8", newline="\n") as out:
        for frame in chain((lazy.collect(engine="streaming") for lazy in rows), [pairs]):
            count += len(frame)
            out.writelines(map(_json, frame.iter_rows(named=True)))
    return count


def write_presets(folder: Path, final: Path, *, with_heldout: bool) -> None:
    """Write presets of fine-tuning and evaluation that read exactly these files.

    :param final: where the folder will be when it is whole.
    """
    finetune: dict[str, Any] = {"data_path": str(final / PAIRS_FILE)}
    presets = {"finetune": finetune}
    if with_heldout:
        finetune["eval_data_path"] = str(final / HELDOUT_FOLDER / PAIRS_FILE)
        presets["evaluate"] = {
            "data_path": str(final / HELDOUT_FOLDER),
            "train_data_path": str(final / PAIRS_FILE),
            "slice_columns": [QUERY_SEEN, ITEMS_SEEN],
            "leave_out_own": "text",  # queries are numbered apart from items
        }
    for stage, knobs in presets.items():
        name = f"{stage}.yaml"
        command = f"# python -m ebr_lib {stage} --config {final / name}\n"
        written = yaml.safe_dump(knobs, allow_unicode=True, sort_keys=False)
        (folder / name).write_text(command + written, encoding="utf-8")


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
