"""Groups of queries that are measured apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ebr_lib.data.text import language_of, split_words
from ebr_lib.evaluate.corpus import Mask
from ebr_lib.evaluate.task import RetrievalTask

IN_TRAINING, SEEN, UNSEEN = "document in training", "seen", "unseen"

Slices = Mapping[str, Mapping[str, Mask]]
"""Grouping to value to which queries have it."""


def query_slices(task: RetrievalTask) -> Slices:
    """Groups of queries: by length, language, whether training saw an answer, and the kept columns.

    A grouping with a single group is left out, except the one by what training saw.
    """
    slices = {"length": _by_length(task.queries), "language": _by_value([language_of(text) for text in task.queries])}
    if (seen := task.corpus.seen) is not None:
        known = [SEEN if any(seen[d] for d, g in grades.items() if g > 0) else UNSEEN for grades in task.relevant]
        slices[IN_TRAINING] = _by_value(known)
    slices |= {name: _by_value(values) for name, values in task.query_columns.items()}
    return {name: groups for name, groups in slices.items() if len(groups) > 1 or name == IN_TRAINING}


def _by_value(values: Sequence[str]) -> dict[str, Mask]:
    array = np.array(values, dtype=object)
    return {str(value): array == value for value in sorted(set(values))}


def _by_length(texts: Sequence[str]) -> dict[str, Mask]:
    """Three groups of about equal size, by words."""
    words = np.array([len(split_words(text)) for text in texts])
    low, high = np.quantile(words, (1 / 3, 2 / 3), method="lower")
    groups = {
        f"up to {low} words": words <= low,
        f"{low + 1} to {high} words": (words > low) & (words <= high),
        f"over {high} words": words > max(low, high),
    }
    return {name: mask for name, mask in groups.items() if mask.any()}
