"""Each query: the groups that it is measured in, and its row in a table for spreadsheets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pandas import Categorical, DataFrame

from ebr_lib.data.text import language_of, split_words
from ebr_lib.evaluate.task import RetrievalTask
from ebr_lib.metrics import Ranking, Values

QUERIES_TABLE = "queries.csv"
IN_TRAINING, SEEN, UNSEEN = "document in training", "seen", "unseen"

Slices = Mapping[str, Categorical]
"""Grouping to the group of each query."""


def query_slices(task: RetrievalTask) -> Slices:
    """Groups of queries: by length, language, whether training saw an answer, and the kept columns.

    A grouping with a single group is left out, except the one by what training saw.
    """
    slices = {"length": _by_length(task.queries), "language": Categorical(list(map(language_of, task.queries)))}
    if (seen := task.corpus.seen) is not None:
        answers = [any(seen[d] for d, grade in grades.items() if grade > 0) for grades in task.relevant]
        slices[IN_TRAINING] = Categorical(np.where(answers, SEEN, UNSEEN))
    slices |= {name: Categorical(values) for name, values in task.query_columns.items()}
    return {name: groups for name, groups in slices.items() if len(groups.categories) > 1 or name == IN_TRAINING}


def _by_length(texts: list[str]) -> Categorical:
    """Three groups of about equal size, by words."""
    words = [len(split_words(text)) for text in texts]
    low, high = np.quantile(words, (1 / 3, 2 / 3), method="lower")
    names = [f"up to {low} words", f"{low + 1} to {high} words", f"over {high} words"]
    groups = Categorical.from_codes(np.searchsorted([low, high], words), names)
    return groups.remove_unused_categories()


def query_table(
    task: RetrievalTask, slices: Slices, metric: str, values: Mapping[str, Values], rankings: Mapping[str, Ranking]
) -> DataFrame:
    """One row per query: its id, text, groups and answers; then three columns per ranker.

    :param values: by ranker, the metric's value of each query.
    """
    ids = np.array([*task.corpus.ids, ""], dtype=object)
    answers = [[d for d, grade in grades.items() if grade > 0] for grades in task.relevant]
    columns: dict[str, object] = {"query_id": task.query_ids, "query": task.queries}
    columns |= {kind: list(groups) for kind, groups in slices.items()}
    columns["answers"] = [" | ".join(ids[documents]) for documents in answers]
    for name, ranking in rankings.items():
        hits = np.array([np.isin(row, documents) for row, documents in zip(ranking.ids, answers, strict=True)])
        columns |= {
            f"{name}: {metric}": values[name].round(6),
            f"{name}: first answer at": np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, None),
            f"{name}: top document": ids[ranking.ids[:, 0]],  # -1, none, is the empty id at the end
        }
    return DataFrame(columns)
