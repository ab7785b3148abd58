"""Tasks that tests of the evaluation share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluate.tasks import jsonl, write_beir


@pytest.fixture
def beir(tmp_path) -> Path:
    return write_beir(tmp_path / "beir")


@pytest.fixture(scope="module")
def module_beir(tmp_path_factory) -> Path:
    """For tests that do not change it."""
    return write_beir(tmp_path_factory.mktemp("module") / "beir")


PLEAS = ["Uniforms save money.", "Zoos protect animals.", "Tourism brings jobs."]
REBUTTALS = ["Uniforms are dear for the poor.", "Zoos cage wild animals.", "Tourism drives rents up."]


@pytest.fixture
def arguments(tmp_path) -> Path:
    """Queries that are documents: q0 by id and text, q1 by text alone (and written otherwise), q2 by id alone."""
    folder = tmp_path / "arguments"
    own = [("q0", PLEAS[0]), ("p1", f"  {PLEAS[1].upper()} "), ("q2", f"On tourism. {PLEAS[2]}")]
    rows = [*own, *((f"c{i}", text) for i, text in enumerate(REBUTTALS))]
    jsonl(folder / "corpus.jsonl", [{"_id": id_, "text": text} for id_, text in rows])
    jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(PLEAS)])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("".join(f"q{i}\tc{i}\t1\n" for i in range(3)))
    return folder
