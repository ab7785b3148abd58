"""One row per query, for a spreadsheet: what each ranker scored, where its first answer is, what it put first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pandas import DataFrame

from ebr_lib.evaluate.corpus import Mask
from ebr_lib.evaluate.slices import Slices
from ebr_lib.evaluate.task import RetrievalTask
from ebr_lib.files import written_whole
from ebr_lib.metrics import Ranking, Values

QUERIES_TABLE = "queries.csv"


def query_table(
    task: RetrievalTask, slices: Slices, metric: str, values: Mapping[str, Values], rankings: Mapping[str, Ranking]
) -> DataFrame:
    """The table: ids and texts, the query's groups, its answers; then three columns per ranker.

    :param values: by ranker, the metric's value of each query.
    """
    ids, found = np.array([*task.corpus.ids, ""], dtype=object), task.relevant
    answers = [[d for d, grade in grades.items() if grade > 0] for grades in found]
    columns: dict[str, object] = {"query_id": task.query_ids, "query": task.queries}
    columns |= {kind: _value_of_each(groups, len(found)) for kind, groups in slices.items()}
    columns["answers"] = [" | ".join(ids[documents]) for documents in answers]
    for name, ranking in rankings.items():
        hits = np.array([np.isin(row, documents) for row, documents in zip(ranking.ids, answers, strict=True)])
        first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, None)
        columns |= {
            f"{name}: {metric}": values[name].round(6),
            f"{name}: first answer at": first,
            f"{name}: top document": ids[ranking.ids[:, 0]],  # -1, none, is the empty id at the end
        }
    return DataFrame(columns)


def _value_of_each(groups: Mapping[str, Mask], queries: int) -> list[str]:
    values = [""] * queries
    for value, mask in groups.items():
        for query in np.flatnonzero(mask):
            values[query] = value
    return values


def write_query_table(path: Path, table: DataFrame) -> None:
    """Write it as CSV in UTF-8 with a byte-order mark, without which Excel misreads Chinese."""
    with written_whole(path) as new:
        table.to_csv(new, index=False, encoding="utf-8-sig")
