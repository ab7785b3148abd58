"""Embedding files: the same rows and the same bits come back from every format, and broken files say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.data import vectors as v
from ebr_lib.errors import DataError, MissingError

FORMATS = [".txt", ".parquet", ".npy"]


def some_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Floats of every size: ordinary ones, the smallest, the largest, both zeros."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2**32, size=rows * dim, dtype=np.uint32).view(np.float32)
    ordinary = generator.standard_normal(rows * dim).astype(np.float32)
    mixed = np.where(np.isfinite(bits) & (generator.random(rows * dim) < 0.5), bits, ordinary)
    mixed[:4] = [0.0, -0.0, np.finfo(np.float32).tiny, np.finfo(np.float32).max]
    return mixed.reshape(rows, dim)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_back_the_same_rows_and_bits(tmp_path: Path, ending: str):
    vectors = some_vectors(3000, 7)
    valid = np.random.default_rng(1).random(3000) < 0.9
    columns = {"id": [f"00{i}" for i in range(3000)], "说明": [None, "", " a\r ", '"', "\u2028"] * 600}
    path = v.write_embeddings(tmp_path / f"e{ending}", columns, vectors, valid)
    back = v.read_embeddings(path)
    assert (bits(back.vectors) == bits(vectors[valid])).all()
    assert back.rows.tolist() == np.flatnonzero(valid).tolist()
    assert back.total == 3000
    assert back.columns == {name: [values[i] for i in back.rows] for name, values in columns.items()}
    kept = v.read_embeddings(path, ["说明"], keep_empty=True)
    assert kept.columns == {"说明": columns["说明"]}
    assert (kept.valid == valid).all()
    assert (bits(kept.vectors[valid]) == bits(vectors[valid])).all()


@pytest.mark.parametrize("ending", FORMATS)
def test_batches_count_rows_through_the_file(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(v, "BLOCK_BYTES", 200)
    monkeypatch.setattr(v, "BATCH_ROWS", 10)
    path = v.write_embeddings(tmp_path / f"e{ending}", {"id": list(map(str, range(95)))}, some_vectors(95, 3))
    batches = list(v.iter_embeddings(path))
    assert len(batches) > 5
    assert [row for batch in batches for row in batch.rows] == list(range(95))
    assert [text for batch in batches for text in batch.columns["id"]] == list(map(str, range(95)))


def test_text_is_what_hive_loads(tmp_path: Path):
    vectors = np.array([[0.1, -1e-7], [3, 1e20]], dtype=np.float32)
    path = v.write_embeddings(tmp_path / "e.txt", {"id": ["1", None]}, vectors, np.array([True, False]))
    assert path.read_bytes() == b"id\x01vector\n1\x010.1 -1e-7\n\\N\x01\n"


def test_parquet_holds_fixed_size_lists(tmp_path: Path):
    import pyarrow.parquet as pq

    path = v.write_embeddings(tmp_path / "e.parquet", {"id": ["1"]}, some_vectors(1, 5))
    assert str(pq.read_schema(path).field("vector").type) == "fixed_size_list<element: float>[5]"


def test_a_folder_of_parts_is_one_file(tmp_path: Path):
    vectors = some_vectors(10, 3)
    for number, part in enumerate((slice(0, 4), slice(4, 10))):
        ids = [str(i) for i in range(10)][part]
        v.write_embeddings(tmp_path / "out" / f"part-0000{number}.txt", {"id": ids}, vectors[part])
    back = v.read_embeddings(tmp_path / "out")
    assert (bits(back.vectors) == bits(vectors)).all()
    assert back.columns["id"] == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"id\x01text\n1\x01a\n", ["no column `vector`", "id, text"]),
        (
            b"id\x01vector\n1\x010.5 1\n2\x010.5\n3\x011 2 3\n",
            ["2 numbers", "row 1 (line 3) holds 1", "row 2", "holds 3"],
        ),
        (b"id\x01vector\n1\x010.5 1\n2\x010.5 x1\n", ["row 1 (line 3)", "'x1'"]),
        (b"id\x01vector\n1\x010.5 nan\n", ["row 0 (line 2)", "'nan'"]),
        (b"id\x01vector\n1\x01[0.5, 1]\n", ["'[0.5,'"]),
        (b"id\x01vector\n1\x010.5 1\n2\n", ["line 3 has 1", "2 columns"]),
        (b"id\x01vector\n1\x01\n2\x01\n", ["none of its 2 rows"]),
        (b"id\x01vector\n\xff\x010.5 1\n", ["not UTF-8"]),
    ],
)
def test_broken_text_says_what_is_wrong(tmp_path: Path, content: bytes, words: list[str]):
    path = tmp_path / "e.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        v.read_embeddings(path)
    assert all(word in str(error.value) for word in [str(path), *words])


@pytest.mark.parametrize("keep_empty", [False, True])
@pytest.mark.parametrize("ending", v.ENDINGS)
def test_a_file_without_any_vector_is_said_to_hold_none(tmp_path: Path, ending: str, keep_empty: bool):
    vectors = np.full((2, 4), np.nan, dtype=np.float32)
    path = v.write_embeddings(tmp_path / f"e{ending}", {"id": ["1", "2"]}, vectors, np.zeros(2, dtype=bool))
    with pytest.raises(DataError, match=r"none of its 2 rows holds a vector"):
        v.read_embeddings(path, keep_empty=keep_empty)


def test_the_first_vector_may_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vectors = some_vectors(3, 4)
    path = v.write_embeddings(tmp_path / "e.txt", {"id": ["1", "2", "3"]}, vectors, np.array([False, True, True]))
    monkeypatch.setattr(v, "BLOCK_BYTES", 1)
    found = v.read_embeddings(path, keep_empty=True)
    assert np.isnan(found.vectors[0]).all()
    assert np.array_equal(bits(found.vectors[1:]), bits(vectors[1:]))


def test_a_cut_file_is_known_by_its_manifest(tmp_path: Path):
    path = v.write_embeddings(tmp_path / "e.txt", {"id": ["1", "2"]}, some_vectors(2, 4))
    v.manifest_path(path).write_text(json.dumps({"rows": {"written": 2}}))
    assert len(v.read_embeddings(path)) == 2
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    with pytest.raises(DataError, match=r"holds 1 rows, its manifest says 2"):
        v.read_embeddings(path)


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_a_cut_binary_file_is_an_error(tmp_path: Path, ending: str):
    path = v.write_embeddings(tmp_path / f"e{ending}", {"id": ["1"] * 50}, some_vectors(50, 4))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="no whole"):
        v.read_embeddings(path)


def test_npy_and_ids_must_agree(tmp_path: Path):
    path = v.write_embeddings(tmp_path / "e.npy", {"id": ["1", "2"]}, some_vectors(2, 4))
    v.ids_path(path).write_bytes(b"id\n1\n")
    with pytest.raises(DataError, match="1 rows"):
        v.read_embeddings(path)


def test_other_peoples_parquet(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({"id": [1, 2], "vector": pa.array([[0.5, 1.0], [2.0, 3.0]], pa.list_(pa.float64()))}), path)
    back = v.read_embeddings(path)
    assert back.columns == {"id": ["1", "2"]}
    assert back.vectors.tolist() == [[0.5, 1.0], [2.0, 3.0]]
    pq.write_table(pa.table({"vector": pa.array([[0.5, 1.0], [2.0]], pa.list_(pa.float32()))}), path)
    with pytest.raises(DataError, match="row 1 holds 1"):
        v.read_embeddings(path)
    pq.write_table(pa.table({"vector": ["0.5 1"]}), path)
    with pytest.raises(DataError, match="wanted lists of float32"):
        v.read_embeddings(path)


def test_missing_things(tmp_path: Path):
    with pytest.raises(MissingError, match="run the inference stage first"):
        v.read_embeddings(tmp_path / "none.txt")
    path = v.write_embeddings(tmp_path / "e.txt", {"id": ["1"]}, some_vectors(1, 4))
    with pytest.raises(DataError, match=r"no column colour; its columns are id, vector"):
        v.read_embeddings(path, ["colour"])


def test_text_refuses_values_that_would_break_it(tmp_path: Path):
    for value in ("a\x01b", "a\nb", "\\N"):
        with pytest.raises(DataError, match=r"write \.parquet"):
            v.write_embeddings(tmp_path / "e.txt", {"id": [value]}, some_vectors(1, 4))
        path = v.write_embeddings(tmp_path / "e.parquet", {"id": [value]}, some_vectors(1, 4))
        assert v.read_embeddings(path).columns == {"id": [value]}


@pytest.mark.parametrize("ending", FORMATS)
def test_a_column_shorter_than_the_vectors_is_refused(tmp_path: Path, ending: str):
    for columns in ({"id": ["1"]}, {"id": ["1", "2"], "text": ["a"]}):
        with pytest.raises(ValueError, match="zip"):
            v.write_embeddings(tmp_path / f"e{ending}", columns, some_vectors(2, 3))
    assert not list(tmp_path.iterdir())


def test_text_that_another_tool_has_written(tmp_path: Path):
    path = tmp_path / "e.txt"
    for content, name, value in [
        (b"id\x01vector\n1\x010.5 12", "id", "1"),  # no newline at the end
        (b"\xef\xbb\xbfid\x01vector\r\n1\x010.5 12\r\n2\x01\r\n", "id", "1"),
        (b"vector\x01id\r\n0.5 12\x011\r\n", "id", "1"),
        (b"vector\x01SIZE X\n0.5 12\x011\r\n", "SIZE X", "1\r"),
        (b"vector\x01id \n0.5 12\x011\n", "id ", "1"),
    ]:
        path.write_bytes(content)
        back = v.read_embeddings(path)
        assert back.vectors.tolist() == [[0.5, 12]]
        assert back.columns == {name: [value]}
