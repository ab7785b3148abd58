"""Embedding files: the same rows and the same bits come back from every format, and broken files say what is wrong."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.data.embeddings import base, files, npy, parquet, text
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


def in_batches(monkeypatch: pytest.MonkeyPatch, rows: int, text_bytes: int) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", text_bytes)
    monkeypatch.setattr(parquet, "BATCH_ROWS", rows)
    monkeypatch.setattr(npy, "BATCH_ROWS", rows)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_back_the_same_rows_and_bits(tmp_path: Path, ending: str):
    vectors = some_vectors(3000, 7)
    valid = np.random.default_rng(1).random(3000) < 0.9
    columns = {"id": [f"00{i}" for i in range(3000)], "说明": [None, "", " a\r ", '"', "\u2028"] * 600}
    path = files.write_embeddings(tmp_path / f"e{ending}", columns, vectors, valid)
    back = files.read_embeddings(path)
    assert (bits(back.vectors) == bits(vectors[valid])).all()
    assert back.rows.tolist() == np.flatnonzero(valid).tolist()
    assert back.total == 3000
    assert back.columns == {name: [values[i] for i in back.rows] for name, values in columns.items()}
    kept = files.read_embeddings(path, ["说明"], keep_empty=True)
    assert kept.columns == {"说明": columns["说明"]}
    assert (kept.valid == valid).all()
    assert (bits(kept.vectors[valid]) == bits(vectors[valid])).all()


@pytest.mark.parametrize("ending", FORMATS)
def test_batches_count_rows_through_the_file(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch):
    in_batches(monkeypatch, 10, 200)
    path = files.write_embeddings(tmp_path / f"e{ending}", {"id": list(map(str, range(95)))}, some_vectors(95, 3))
    for keep_empty in (False, True):
        batches = list(files.iter_embeddings(path, keep_empty=keep_empty))
        assert len(batches) > 5
        assert [row for batch in batches for row in batch.rows] == list(range(95))
        assert [text for batch in batches for text in batch.columns["id"]] == list(map(str, range(95)))


@pytest.mark.parametrize("ending", FORMATS)
def test_batches_without_vectors_hold_none(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch):
    in_batches(monkeypatch, 1, 1)
    valid = np.array([False, True, False])
    path = files.write_embeddings(tmp_path / f"e{ending}", {"id": ["1", "2", "3"]}, some_vectors(3, 4), valid)
    for batch in files.iter_embeddings(path):
        assert len(batch.vectors) == len(batch.rows) == len(batch.columns["id"])
        assert batch.vectors.dtype == np.float32
    assert [row for batch in files.iter_embeddings(path) for row in batch.rows] == [1]


@pytest.mark.parametrize("ending", FORMATS)
def test_the_bar_ends_where_the_file_does(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch):
    import tqdm.auto

    bars = []

    class Bar(tqdm.auto.tqdm):
        def __exit__(self, *error):
            bars.append((self.n, self.total))
            super().__exit__(*error)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    in_batches(monkeypatch, 10, 200)
    path = files.write_embeddings(tmp_path / f"e{ending}", {"id": list(map(str, range(95)))}, some_vectors(95, 3))
    list(files.iter_embeddings(path))
    [(shown, total)] = bars
    assert total == path.stat().st_size
    assert total - 128 <= shown <= total  # the header of .npy is not counted, batches of Parquet are rounded down


def test_text_is_what_hive_loads(tmp_path: Path):
    vectors = np.array([[0.1, -1e-7], [3, 1e20]], dtype=np.float32)
    path = files.write_embeddings(tmp_path / "e.txt", {"id": ["1", None]}, vectors, np.array([True, False]))
    assert path.read_bytes() == b"id\x01vector\n1\x010.1 -1e-7\n\\N\x01\n"


def test_parquet_holds_fixed_size_lists(tmp_path: Path):
    import pyarrow.parquet as pq

    path = files.write_embeddings(tmp_path / "e.parquet", {"id": ["1"]}, some_vectors(1, 5))
    assert str(pq.read_schema(path).field("vector").type) == "fixed_size_list<element: float>[5]"


def test_parquet_compresses_texts_and_leaves_vectors_as_they_are(tmp_path: Path):
    import pyarrow.parquet as pq

    path = files.write_embeddings(tmp_path / "e.parquet", {"id": ["1"] * 50}, some_vectors(50, 5))
    ids, vectors = (pq.read_metadata(path).row_group(0).column(i) for i in range(2))
    assert (ids.compression, ids.has_dictionary_page, ids.is_stats_set) == ("ZSTD", True, True)
    assert (vectors.compression, vectors.has_dictionary_page, vectors.is_stats_set) == ("UNCOMPRESSED", False, False)


@pytest.mark.parametrize("ending", FORMATS)
def test_wider_floats_are_written_as_float32(tmp_path: Path, ending: str):
    vectors = np.array([[0.1, 1 / 3]])
    wide = files.write_embeddings(tmp_path / f"wide{ending}", {"id": ["1"]}, vectors)
    narrow = files.write_embeddings(tmp_path / f"narrow{ending}", {"id": ["1"]}, vectors.astype(np.float32))
    assert wide.read_bytes() == narrow.read_bytes()


@pytest.mark.parametrize("ending", FORMATS)
def test_a_column_shorter_than_the_vectors_is_refused(tmp_path: Path, ending: str):
    for columns in ({"id": ["1"]}, {"id": ["1", "2"], "text": ["a"]}):
        with pytest.raises(ValueError, match="zip"):
            files.write_embeddings(tmp_path / f"e{ending}", columns, some_vectors(2, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_is_written_beside_its_place(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch):
    """Moved across disks it would not appear at once."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    path = files.write_embeddings(tmp_path / "new" / "folder" / f"e{ending}", {"id": ["1"]}, some_vectors(1, 4))
    assert len(files.read_embeddings(path)) == 1


@pytest.mark.parametrize("ending", FORMATS)
def test_work_files_continue_from_their_last_commit(tmp_path: Path, ending: str):
    vectors, place, work = some_vectors(9, 3), tmp_path / f"e{ending}", tmp_path / "work"
    rows = [[b"%d" % i, None] for i in range(9)]
    valid = np.arange(9) % 4 > 0

    def append(sink: base.Sink, part: slice) -> None:
        sink.append(rows[part], vectors[part], valid[part])

    work.mkdir()
    sink = files.open_sink(place, work, ["id", "text"], 3)
    append(sink, slice(0, 2))
    sizes = sink.commit()
    append(sink, slice(2, 5))  # lost
    sink.close()
    sink = files.open_sink(place, work, ["id", "text"], 3, sizes)
    append(sink, slice(2, 4))
    sink.commit()
    append(sink, slice(4, 6))
    assert sink.commit() == {path.name: path.stat().st_size for path in work.iterdir()}
    sink.close()
    files.finish_sink(place, work)
    sizes = files.reopen(place, work)
    assert sizes == {path.name: path.stat().st_size for path in work.iterdir()}
    sink = files.open_sink(place, work, ["id", "text"], 3, sizes)
    append(sink, slice(6, 9))
    sink.commit()
    sink.close()
    files.finish_sink(place, work)
    back = files.read_embeddings(place, keep_empty=True)
    assert back.columns == {"id": list("012345678"), "text": [None] * 9}
    assert (back.valid == valid).all()
    assert (bits(back.vectors[valid]) == bits(vectors[valid])).all()


@pytest.mark.parametrize("ending", FORMATS)
def test_a_folder_of_parts_is_one_file(tmp_path: Path, ending: str):
    vectors = some_vectors(10, 3)
    for number, part in enumerate((slice(0, 4), slice(4, 10))):
        ids = [str(i) for i in range(10)][part]
        files.write_embeddings(tmp_path / "out" / f"part-0000{number}{ending}", {"id": ids}, vectors[part])
    (tmp_path / "out" / f"part-00000{ending}.rejects").write_bytes(b"no vectors")
    for keep_empty in (False, True):
        back = files.read_embeddings(tmp_path / "out", keep_empty=keep_empty)
        assert (bits(back.vectors) == bits(vectors)).all()
        assert back.columns["id"] == [str(i) for i in range(10)]
        assert back.rows.tolist() == list(range(10))


@pytest.mark.parametrize("ending", FORMATS)
def test_parts_must_be_of_one_width(tmp_path: Path, ending: str):
    files.write_embeddings(tmp_path / f"part-0{ending}", {"id": ["1"]}, some_vectors(1, 5))
    files.write_embeddings(tmp_path / f"part-1{ending}", {"id": ["2"]}, some_vectors(1, 4))
    with pytest.raises(DataError) as error:
        files.read_embeddings(tmp_path)
    place, said = str(error.value).split(": ", 1)
    assert place == str(tmp_path / f"part-1{ending}")
    assert {"4", "5"} <= set(re.findall(r"\d+", said))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"id\x01text\n1\x01a\n", ["no column `vector`", "id, text"]),
        (b"id\x01\xff\n1\x01a\n", ["no column `vector`", "id, \ufffd"]),
        (
            b"id\x01vector\n1\x010.5 1\n2\x010.5\n3\x011 2 3\n",
            ["2 numbers", "row 1 (line 3) holds 1", "row 2", "holds 3"],
        ),
        (b"id\x01vector\n1\x010.5 1\n2\x010.5 x1\n", ["row 1 (line 3)", "'x1'"]),
        (b"id\x01vector\n1\x010.5 nan\n", ["row 0 (line 2)", "'nan'"]),
        (b"id\x01vector\n1\x010.5 1 2\n2\x010.5  1\n", ["row 1 (line 3)", "b''"]),
        (b"id\x01vector\n" + b"1\x010.5 1_0\n" * 4, ["the vectors of rows 0 to 3 cannot be read"]),
        (b"id\x01vector\n1\x01[0.5, 1]\n", ["'[0.5,'"]),
        (b'id\x01vector\n1\x01"0.5" 1\n', ["row 0 (line 2)", '"0.5"']),
        (b"id\x01vector\n1\x010.5 1\n2\n", ["line 3 has 1", "2 columns"]),
        (b"id\x01vector\n1\x010.5 1\n" + b"2\n" * 6, ["line 6 has 1; line 7 has 1; the file was cut"]),
        (b"id\x01vector\n1\x01\n2\x01\n", ["none of its 2 rows"]),
        (b"id\x01vector\n\xff\x010.5 1\n", ["not UTF-8"]),
    ],
)
def test_broken_text_says_what_is_wrong(tmp_path: Path, content: bytes, words: list[str]):
    path = tmp_path / "e.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        files.read_embeddings(path)
    assert all(word in str(error.value) for word in [str(path), *words])


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
        back = files.read_embeddings(path)
        assert back.vectors.tolist() == [[0.5, 12]]
        assert back.columns == {name: [value]}


def file_of(folder: Path, ending: str, vectors: np.ndarray) -> Path:
    """A file of vectors that are written as they are, infinity among them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"e{ending}"
    if ending == ".npy":
        np.save(path, vectors)
    elif ending == ".parquet":
        pq.write_table(pa.table({"vector": pa.array(vectors.tolist(), pa.list_(pa.float32()))}), path)
    else:
        path.write_text("vector\n" + "".join(" ".join(map(str, row)) + "\n" for row in vectors))
    return path


@pytest.mark.parametrize("ending", FORMATS)
def test_a_value_that_is_not_a_number_is_named_by_its_row_in_the_file(tmp_path: Path, ending: str, monkeypatch):
    in_batches(monkeypatch, 2, 1)
    vectors = np.ones((9, 3), dtype=np.float32)
    vectors[7, 1] = np.inf
    path = file_of(tmp_path, ending, vectors)
    with pytest.raises(DataError, match=rf"^{path}: .*row 7\b"):
        files.read_embeddings(path)


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
@pytest.mark.parametrize(("wrong", "named"), [(1, "1;"), (5, "1, 2, 3, 4, 5;"), (6, "1, 2, 3, 4, 5 and 1 more;")])
def test_rows_with_values_that_are_not_numbers_are_named_up_to_five(
    tmp_path: Path, ending: str, wrong: int, named: str
):
    vectors = np.ones((9, 3), dtype=np.float32)
    vectors[1 : 1 + wrong, 1] = -np.inf
    path = file_of(tmp_path, ending, vectors)
    with pytest.raises(DataError, match=rf"^{path}: .* in row {named}"):
        files.read_embeddings(path)


@pytest.mark.parametrize(("wrong", "more"), [(1, ""), (3, ""), (5, ""), (6, " and 1 rows more")])
def test_rows_of_text_with_values_that_are_not_numbers_are_named_up_to_five(tmp_path: Path, wrong: int, more: str):
    path = tmp_path / "e.txt"
    path.write_bytes(b"vector\n1 2\n" + b"nan x\n" * wrong + b"3 4\n")
    named = ", ".join(rf"b'nan' in row {row} \(line {row + 2}\)" for row in range(1, 1 + min(5, wrong)))
    with pytest.raises(DataError, match=rf"^{path}: .*: {named}{more}; "):
        files.read_embeddings(path)


@pytest.mark.parametrize(("wrong", "more"), [(5, ""), (6, " and 1 rows more"), (7, " and 2 rows more")])
def test_rows_of_another_length_are_named_up_to_five(tmp_path: Path, wrong: int, more: str):
    path = tmp_path / "e.txt"
    path.write_bytes(b"vector\n1 2\n" + b"1\n" * wrong)
    with pytest.raises(DataError, match=rf"row 4 \(line 6\) holds 1, row 5 \(line 7\) holds 1{more}; every row"):
        files.read_embeddings(path)


def test_a_row_of_another_length_is_found_in_a_later_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    in_batches(monkeypatch, 2, 1)
    text = tmp_path / "e.txt"
    text.write_bytes(b"vector\n" + b"1 2\n" * 6 + b"1 2 3\n")
    with pytest.raises(DataError, match=r"2 numbers in its first row, but row 6 \(line 8\) holds 3"):
        files.read_embeddings(text)
    parquet = tmp_path / "e.parquet"
    ragged = [[1.0, 2.0]] * 6 + [[1.0, 2.0, 3.0]] * 2
    pq.write_table(pa.table({"vector": pa.array(ragged, pa.list_(pa.float32()))}), parquet)
    with pytest.raises(DataError, match=r"2 numbers in its first row, but row 6 holds 3, row 7 holds 3$"):
        files.read_embeddings(parquet)


@pytest.mark.parametrize("keep_empty", [False, True])
@pytest.mark.parametrize("ending", base.ENDINGS)
def test_a_file_without_vectors_is_an_error(tmp_path: Path, ending: str, keep_empty: bool):
    vectors = np.full((2, 4), np.nan, dtype=np.float32)
    path = files.write_embeddings(tmp_path / f"e{ending}", {"id": ["1", "2"]}, vectors, np.zeros(2, dtype=bool))
    with pytest.raises(DataError, match=r"none of its 2 rows holds a vector"):
        files.read_embeddings(path, keep_empty=keep_empty)


@pytest.mark.parametrize("ending", FORMATS)
def test_the_first_vector_may_come_late(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch):
    vectors = some_vectors(3, 4)
    path = files.write_embeddings(
        tmp_path / f"e{ending}", {"id": ["1", "2", "3"]}, vectors, np.array([False, True, True])
    )
    in_batches(monkeypatch, 1, 1)
    found = files.read_embeddings(path, keep_empty=True)
    assert np.isnan(found.vectors[0]).all()
    assert np.array_equal(bits(found.vectors[1:]), bits(vectors[1:]))


def test_the_manifest_shows_that_a_file_was_cut(tmp_path: Path):
    path = files.write_embeddings(tmp_path / "e.txt", {"id": ["1", "2"]}, some_vectors(2, 4))
    base.manifest_path(path).write_text(json.dumps({"rows": {"written": 2}}))
    assert len(files.read_embeddings(path)) == 2
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    with pytest.raises(DataError, match=r"holds 1 rows, its manifest says 2"):
        files.read_embeddings(path)


def test_a_manifest_of_another_kind(tmp_path: Path):
    path = files.write_embeddings(tmp_path / "e.txt", {"id": ["1"]}, some_vectors(1, 4))
    for held in ({}, {"rows": {}}):
        base.manifest_path(path).write_text(json.dumps(held))
        assert len(files.read_embeddings(path)) == 1
    for held, words in (("{", "is not a readable manifest"), ("[]", "wanted a JSON object, found list")):
        base.manifest_path(path).write_text(held)
        with pytest.raises(DataError, match=rf"^{base.manifest_path(path)}.*{words}"):
            files.read_embeddings(path)


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_a_cut_binary_file_is_an_error(tmp_path: Path, ending: str):
    path = files.write_embeddings(tmp_path / f"e{ending}", {"id": ["1"] * 50}, some_vectors(50, 4))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="not a complete"):
        files.read_embeddings(path)


def test_npy_and_ids_must_agree(tmp_path: Path):
    path = files.write_embeddings(tmp_path / "e.npy", {"id": ["1", "2"]}, some_vectors(2, 4))
    assert base.ids_path(path) == tmp_path / "e.ids.txt"
    base.ids_path(path).write_bytes(b"id\n1\n")
    with pytest.raises(DataError, match="1 rows"):
        files.read_embeddings(path)
    for content, words in ((b"id\n1\n2\x01\n", "line 3 has 2"), (b"id\n1\n\xff\n", "not UTF-8")):
        base.ids_path(path).write_bytes(content)
        with pytest.raises(DataError, match=f"^{base.ids_path(path)}: .*{words}"):
            files.read_embeddings(path)
    for name in ("SIZE X", "id "):
        base.ids_path(path).write_bytes(name.encode() + b"\n1\n2\n")
        assert files.read_embeddings(path).columns == {name: ["1", "2"]}


def test_npy_without_ids_has_no_columns(tmp_path: Path):
    path = tmp_path / "e.npy"
    np.save(path, np.array([[0.1, 1 / 3]]))
    back = files.read_embeddings(path)
    assert back.columns == {}
    assert back.vectors.dtype == np.float32
    assert (bits(back.vectors) == bits(np.array([[0.1, 1 / 3]], dtype=np.float32))).all()
    with pytest.raises(DataError, match=rf"^{path}: no column id, text; its columns are vector"):
        files.read_embeddings(path, ["id", "text"])


@pytest.mark.parametrize(
    "array",
    [np.ones(4, np.float32), np.ones((2, 2, 2), np.float32), np.ones((2, 2), np.int64), np.ones((2, 0), np.float32)],
)
def test_npy_of_another_shape_or_kind_is_refused(tmp_path: Path, array: np.ndarray):
    path = tmp_path / "e.npy"
    np.save(path, array)
    words = re.escape(f"{path}: wanted floats of rows × dimensions, found {array.dtype} of shape {array.shape}")
    with pytest.raises(DataError, match=words):
        files.read_embeddings(path)


def test_npy_that_is_a_pickle_is_not_opened(tmp_path: Path):
    path = tmp_path / "e.npy"
    path.write_bytes(pickle.dumps(np.ones((2, 2), np.float32)))
    with pytest.raises(DataError, match=r"not a complete \.npy file"):
        files.read_embeddings(path)


def test_other_peoples_parquet(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({"id": [1, 2], "vector": pa.array([[0.5, 1.0], [2.0, 3.0]], pa.list_(pa.float64()))}), path)
    back = files.read_embeddings(path)
    assert back.columns == {"id": ["1", "2"]}
    assert back.vectors.tolist() == [[0.5, 1.0], [2.0, 3.0]]
    pq.write_table(pa.table({"vector": pa.array([[0.5, 1.0], [2.0]], pa.list_(pa.float32()))}), path)
    with pytest.raises(DataError, match="row 1 holds 1"):
        files.read_embeddings(path)
    pq.write_table(pa.table({"vector": ["0.5 1"]}), path)
    with pytest.raises(DataError, match="wanted lists of float32"):
        files.read_embeddings(path)
    vectors = pa.array([[0.5, None]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"vector": vectors}), path)
    with pytest.raises(DataError, match="non-finite number in row 0"):
        files.read_embeddings(path)
    pq.write_table(pa.table({"id": [[1]], "vector": pa.array([[0.5]], pa.list_(pa.float32()))}), path)
    with pytest.raises(DataError, match=rf"^{path}: column id is list"):
        files.read_embeddings(path)
    pq.write_table(pa.table({"id": ["1"]}), path)
    with pytest.raises(DataError, match=rf"^{path}: no column `vector`"):
        files.read_embeddings(path)


def test_missing_things(tmp_path: Path):
    with pytest.raises(MissingError, match="there is no such file"):
        files.read_embeddings(tmp_path / "none.txt")
    for ending in FORMATS:
        path = files.write_embeddings(tmp_path / f"e{ending}", {"id": ["1"]}, some_vectors(1, 4))
        with pytest.raises(DataError, match=rf"^{tmp_path / 'e'}.*: no column colour; its columns are id"):
            files.read_embeddings(path, ["colour"])


def test_text_refuses_values_that_would_break_it(tmp_path: Path):
    for value in ("a\x01b", "a\nb", "\\N"):
        with pytest.raises(DataError, match=rf"^{tmp_path / 'e.txt'}: row 0: .* write \.parquet"):
            files.write_embeddings(tmp_path / "e.txt", {"id": [value]}, some_vectors(1, 4))
        path = files.write_embeddings(tmp_path / "e.parquet", {"id": [value]}, some_vectors(1, 4))
        assert files.read_embeddings(path).columns == {"id": [value]}
