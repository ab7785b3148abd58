"""Catalogues: the same documents from every format, and what cannot be one."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ebr_lib.data.catalogue import read_catalogue
from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.data.text import text_keys
from ebr_lib.errors import DataError, MissingError

TEXTS = ["毛毯 wool", "kettle", "  ", "KETTLE ", "lamp"]
IDS = ["1", "2", "3", "4", "5"]


def read(path, column=None):
    return read_catalogue(path, column, "mining_corpus_column")


def test_hive_text_and_parquet_give_distinct_texts_in_order(tmp_path, caplog):
    hive, parquet = tmp_path / "items.txt", tmp_path / "items.parquet"
    lines = ["id\x01description", *(f"{i}\x01{text}" for i, text in zip(IDS, TEXTS, strict=True)), "6\x01\\N"]
    hive.write_text("\n".join(lines) + "\n", encoding="utf-8")
    pq.write_table(pa.table({"id": [*IDS, "6"], "description": [*TEXTS, None]}), parquet)
    for path in (hive, parquet):
        found = read(path)
        assert found.texts == ["毛毯 wool", "kettle", "lamp"]
        assert found.vectors is None and np.array_equal(found.keys, text_keys(found.texts))
        assert read(path, "id").texts == [*IDS, "6"]
    assert read(hive).sha256 == read(parquet).sha256
    left = read(hive).without(set(text_keys(["Kettle"]).tolist()))
    assert left.texts == ["毛毯 wool", "lamp"] and left.sha256 != read(hive).sha256


@pytest.mark.parametrize("ending", ["txt", "parquet", "npy"])
def test_an_embedding_file_gives_its_vectors_with_the_texts(tmp_path, ending):
    vectors = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    valid = np.array([True, True, True, True, False])
    path = write_embeddings(tmp_path / f"items.{ending}", {"id": IDS, "words": TEXTS}, vectors, valid)
    manifest_path(path).write_text(json.dumps({"settings": {"description_column": "words"}}))
    found = read(path)
    assert found.texts == ["毛毯 wool", "kettle"]  # lamp has no vector
    assert found.vectors == pytest.approx(vectors[:2] / np.linalg.norm(vectors[:2], axis=1, keepdims=True))
    assert found.manifest["settings"] == {"description_column": "words"}
    assert found.without(set(text_keys(["毛毯 wool"]).tolist())).vectors == pytest.approx(found.vectors[1:])


def test_what_cannot_be_a_catalogue(tmp_path):
    with pytest.raises(MissingError, match="there is no such file"):
        read(tmp_path / "nowhere.txt")
    path = tmp_path / "items.csv"
    path.write_text("id,name\n1,kettle\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no column of text.*found id, name; name it with mining_corpus_column"):
        read(path)
    path.write_text("id,text\n1,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"none of its 1 rows has text; name another column with mining_corpus_column"):
        read(path)
