"""Vectors in fewer bytes: what is stored is what the formulas say, and what is read is exactly what is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ebr_lib.data.embeddings import codes, files
from ebr_lib.data.embeddings.base import ids_path
from ebr_lib.errors import DataError
from ebr_lib.metrics import unit

FORMATS = [".parquet", ".npy"]
VALID = np.arange(40) % 5 != 2
VECTORS = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
VECTORS[4] = 0


def by_hand(vector_type: str, vector: np.ndarray) -> tuple[list[int] | np.ndarray, np.float32]:
    """What is stored of one vector, number by number."""
    if vector_type == "float16":
        return vector.astype(np.float16), np.float32(1)
    if vector_type == "int8":
        scale = np.float32(max(abs(vector)) / np.float32(127))
        return [round(float(number / scale)) if scale else 0 for number in vector], scale
    bits = "".join("1" if number > 0 else "0" for number in vector)
    return [int(bits[i : i + 8], 2) for i in range(0, 16, 8)], np.float32(np.mean(np.abs(vector.astype(np.float64))))


def vector_of(vector_type: str, stored: np.ndarray, scale: np.float32) -> np.ndarray:
    if vector_type == "binary":
        stored = np.array([1 if bit == "1" else -1 for byte in stored for bit in f"{byte:08b}"])
    return np.asarray(stored, np.float32) * scale


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("vector_type", ["float16", "int8", "binary"])
def test_files_hold_what_the_formulas_say_and_give_it_back_exactly(tmp_path: Path, ending: str, vector_type: str):
    columns = {"id": [f"00{i}" for i in range(40)], "说明": [None, "", "a b", '"'] * 10}
    path = files.write_embeddings(tmp_path / f"e{ending}", columns, VECTORS, VALID, vector_type)
    rows = [by_hand(vector_type, VECTORS[i]) for i in np.flatnonzero(VALID)]
    back = files.read_embeddings(path)
    wanted = np.stack([vector_of(vector_type, stored, scale) for stored, scale in rows])
    assert back.vectors.dtype == np.float32
    assert (back.vectors == wanted).all()
    assert back.rows.tolist() == np.flatnonzero(VALID).tolist()
    assert back.columns == {name: [values[i] for i in back.rows] for name, values in columns.items()}
    assert (files.read_embeddings(path, (), keep_empty=True).valid == VALID).all()
    if ending == ".parquet":
        table = pq.read_table(path)
        stored = [vector for vector in table["vector"].to_pylist() if vector is not None]
        scales = table["vector_scale"].drop_null().to_pylist() if vector_type != "float16" else []
    else:
        array = np.load(path)
        stored = array[VALID].tolist()
        scales = []
        if vector_type != "float16":
            lines = [line.split("\x01") for line in ids_path(path).read_text("utf-8").split("\n")[1:-1]]
            assert {line[-1] for line, has_one in zip(lines, VALID, strict=True) if not has_one} == {"\\N"}
            assert not array[~VALID].any()
            scales = [float(np.float32(line[-1])) for line, has_one in zip(lines, VALID, strict=True) if has_one]
    assert np.array_equal(stored, np.stack([stored for stored, _ in rows]))
    assert scales == ([float(scale) for _, scale in rows] if vector_type != "float16" else [])


@pytest.mark.parametrize(("vector_type", "width"), [("float16", 32), ("int8", 16), ("binary", 2)])
def test_the_array_takes_as_many_bytes_as_promised(tmp_path: Path, vector_type: str, width: int):
    path = files.write_embeddings(tmp_path / "e.npy", {}, VECTORS, vector_type=vector_type)
    assert np.load(path).nbytes == 40 * width


def test_cosines_need_no_scales():
    """An engine that takes int8 or bits, and knows nothing of scales, ranks as the vectors that are read back do."""
    queries = unit(np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32))
    vectors = VECTORS[VECTORS.any(axis=1)]
    for vector_type in ("int8", "binary"):
        stored, scales = codes.quantised(vectors, np.ones(39, bool), vector_type)
        alone = unit(codes.restored(stored, np.ones(39, np.float32)))
        np.testing.assert_allclose(queries @ alone.T, queries @ unit(codes.restored(stored, scales)).T, atol=1e-6)


def test_int8_is_off_by_half_a_step_at_most():
    stored, scales = codes.quantised(VECTORS, np.ones(40, bool), "int8")
    off = np.abs(codes.restored(stored, scales) - VECTORS)
    assert (off <= 0.5001 * scales[:, None]).all()
    assert off.max() > 0.4 * scales.max()


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("vector_type", ["float16", "int8", "binary"])
def test_work_files_continue_from_their_last_commit(tmp_path: Path, ending: str, vector_type: str):
    rows = [[b"%d" % i] for i in range(40)]
    whole = files.write_embeddings(
        tmp_path / f"whole{ending}", {"id": list(map(str, range(40)))}, VECTORS, VALID, vector_type
    )
    place, work = tmp_path / f"e{ending}", tmp_path / "work"
    work.mkdir()

    def write(part: slice, lost: slice, sizes: dict[str, int] | None) -> dict[str, int]:
        sink = files.open_sink(place, work, ["id"], 16, sizes, vector_type=vector_type)
        sink.append(rows[part], VECTORS[part], VALID[part])
        sizes = sink.commit()
        sink.append(rows[lost], VECTORS[lost], VALID[lost])
        sink.close()
        return sizes

    sizes = write(slice(0, 7), slice(7, 20), None)
    sizes = write(slice(7, 23), slice(0, 0), sizes)
    files.finish_sink(place, work)
    sizes = files.reopen(place, work)
    write(slice(23, 40), slice(0, 0), sizes)
    files.finish_sink(place, work)
    if ending == ".npy":  # Parquet keeps the batches as they were written
        assert place.read_bytes() == whole.read_bytes()
        assert ids_path(place).read_bytes() == ids_path(whole).read_bytes()
    again, once = files.read_embeddings(place), files.read_embeddings(whole)
    assert (again.vectors == once.vectors).all()
    assert (again.rows == once.rows).all()


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds 7e\+04, and float16 numbers up to 65,504"):
        files.write_embeddings(tmp_path / "e.npy", {}, np.full((2, 8), 7e4, np.float32), vector_type="float16")
    assert not list(tmp_path.iterdir())


def test_text_and_bits_of_unfinished_bytes_cannot_be_written(tmp_path: Path):
    for name, dim, vector_type in (("e.txt", 8, "int8"), ("e.npy", 12, "binary"), ("e.parquet", 12, "binary")):
        with pytest.raises(ValueError, match=r"text holds float32|whole bytes"):
            files.write_embeddings(tmp_path / name, {}, np.ones((2, dim), np.float32), vector_type=vector_type)


def test_whole_numbers_without_scales_are_refused(tmp_path: Path):
    """Such as those of other tools, whose scales are elsewhere."""
    path = tmp_path / "e.npy"
    np.save(path, np.ones((2, 8), np.int8))
    with pytest.raises(DataError, match="no column `vector_scale`"):
        files.read_embeddings(path)
    ids_path(path).write_bytes(b"id\n1\n2\n")
    with pytest.raises(DataError, match="no column `vector_scale`"):
        files.read_embeddings(path, ["id"])
    ids_path(path).write_bytes(b"id\x01vector_scale\n1\x01x\n2\x010.5\n")
    with pytest.raises(DataError, match="`vector_scale` holds no number"):
        files.read_embeddings(path)
    parquet = files.write_embeddings(tmp_path / "e.parquet", {"id": ["1", "2"]}, VECTORS[:2], vector_type="int8")
    pq.write_table(pq.read_table(parquet).drop_columns("vector_scale"), parquet)
    with pytest.raises(DataError, match="no column `vector_scale`"):
        files.read_embeddings(parquet)


def test_a_column_of_this_name_beside_floats_is_an_ordinary_one(tmp_path: Path):
    for ending in FORMATS:
        path = files.write_embeddings(tmp_path / f"e{ending}", {"vector_scale": list("ab")}, VECTORS[:2])
        assert files.read_embeddings(path).columns == {"vector_scale": ["a", "b"]}


def test_parts_of_bits_must_be_of_one_width(tmp_path: Path):
    files.write_embeddings(tmp_path / "part-0.npy", {}, VECTORS, vector_type="binary")
    files.write_embeddings(tmp_path / "part-1.npy", {}, VECTORS[:, :8], vector_type="binary")
    with pytest.raises(DataError, match="vectors of 8 numbers, in the files before it 16"):
        files.read_embeddings(tmp_path)
