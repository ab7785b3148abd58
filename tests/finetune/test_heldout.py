"""The held-out task: which documents training has seen, in the measure and in the saved corpus."""

from __future__ import annotations

import json

import pytest

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.data.text import normalised
from ebr_lib.finetune.heldout import build_task
from ebr_lib.finetune.outputs import before_after, save_heldout
from ebr_lib.finetune.rows import Rows
from ebr_lib.tables import as_text

HELDOUT = [TrainingRow("query", "The  Document")]
TRAIN = {
    "its text is a positive": (TrainingRow("other", "the document"), True),
    "its text is an anchor": (TrainingRow("THE document", "other"), True),
    "its text is a negative": (TrainingRow("other", "another", ("x", "the document")), True),
    "nowhere": (TrainingRow("query two", "the documents"), False),
}


@pytest.mark.parametrize(("row", "seen"), TRAIN.values(), ids=TRAIN)
def test_a_document_is_unseen_when_no_training_row_has_its_text(row, seen, tmp_path):
    assert build_task(HELDOUT, [row], 10, 0).seen == (seen,)
    save_heldout(Rows([row], HELDOUT, None, ""), tmp_path)
    corpus = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    flags = {normalised(document["text"]): document["seen"] for document in corpus}
    assert flags == {normalised(row.positive): True} | {"the document": seen}


def test_without_held_out_rows_the_table_says_so():
    table = before_after({}, {})
    assert table.empty and "no rows were held out" in as_text(table)
