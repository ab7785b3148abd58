"""The index is measured with the queries of the given column."""

from __future__ import annotations

import pytest

from ebr_lib import build_faiss_index
from tests.index.test_index import embedding_file


def test_the_index_is_measured_with_the_given_column(tiny_bert, tmp_path):
    vectors = embedding_file(tmp_path / "embeds.txt", tiny_bert)
    (tmp_path / "q.csv").write_text("wish\nwarm blanket\n")
    config = {
        "embedding_path": str(vectors),
        "output_dir": str(tmp_path / "i"),
        "queries_path": str(tmp_path / "q.csv"),
    }
    assert build_faiss_index(config | {"query_column": "wish"}).measured_on == "real queries"
    with pytest.raises(ValueError, match="name it with query_column"):
        build_faiss_index(config)
