"""Several indexes answer the same queries side by side, and in a box."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.index.run import build_faiss_index
from ebr_lib.index.side_by_side import search_box, search_examples, usual_queries
from tests.index.test_index import TEXTS, embedding_file


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_models) -> dict[str, Path]:
    """Indexes of two models, whose manifests name the text that was encoded."""
    place, folders = tmp_path_factory.mktemp("both"), {}
    for name in ("bert", "xlm-r"):
        file = embedding_file(place / f"{name}.txt", tiny_models(name))
        manifest = json.loads(manifest_path(file).read_text())
        manifest["settings"]["description_column"] = "description"
        manifest_path(file).write_text(json.dumps(manifest))
        knobs = {"embedding_path": str(file), "output_dir": str(place / name)}
        folders[name] = build_faiss_index(knobs).folder
    return folders


def test_each_query_has_each_index_s_answers_with_text_and_id(built):
    found = search_examples(built, ["steel frying pan", "<b>洗发水</b>"], k=2)
    table = found.tables["found"]
    assert list(table.columns) == ["query", "rank", "bert", "xlm-r"] and len(table) == 4
    for name in built:
        assert table[name][0].startswith("1.000 steel frying pan · p2")
    shown = found._repr_html_()
    assert "&lt;b&gt;洗发水&lt;/b&gt;" in shown and "<b>洗发水</b>" not in shown
    assert "steel frying pan" in repr(found)


def test_queries_come_from_the_data_at_hand(built, tmp_path):
    assert usual_queries(built["bert"]) == TEXTS[:5]  # measured with its own rows: their texts
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"query": f"q{i}"}) + "\n" for i in range(9)))
    file = built["bert"].parent / "bert.txt"
    knobs = {"embedding_path": str(file), "queries_path": str(asked), "output_dir": str(tmp_path / "index")}
    folder = build_faiss_index(knobs).folder
    assert usual_queries(folder) == [f"q{i}" for i in range(5)]
    assert search_examples(folder).tables["found"]["query"].unique().tolist() == [f"q{i}" for i in range(5)]


def test_the_box_searches_when_a_query_is_entered_and_shows_mistakes(built):
    pytest.importorskip("ipywidgets")
    box = search_box(built, k=1)
    (text, _), shown = box.children[0].children, box.children[1]
    text.value = "steel frying pan"
    assert shown.value.count("1.000 steel frying pan") == 2
    text.value = "\ud800"
    assert "query" in shown.value and "1.000" not in shown.value
