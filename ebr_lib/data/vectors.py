"""Embedding files, in and out: delimited text that Hive can load, Parquet, and `.npy` with its ids.

All three hold the same rows in the same order: the kept columns as text, and a float32 vector or nothing. Text has
the vector as shortest round-trip decimals separated by single spaces, so every format gives back the same bits.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Vectors
from ebr_lib.data.fields import NULL
from ebr_lib.data.hive import BOM
from ebr_lib.errors import DataError, MissingError
from ebr_lib.files import room_beside

if TYPE_CHECKING:
    import pyarrow as pa

DELIMITER = b"\x01"
VECTOR = "vector"
AGAIN = "run the inference again"  # what helps against most of what can be wrong with such a file
PART_PREFIX = "part-"  # of the files of a folder that is one embedding file
TEXT, PARQUET, NPY = ".txt", ".parquet", ".npy"
ENDINGS = (TEXT, ".csv", ".tsv", PARQUET, NPY)
BLOCK_BYTES = 1 << 24  # of text parsed at once
BATCH_ROWS = 1 << 14
FORMAT_ROWS = 1 << 6  # formatted at once: their copies stay in the cache, and between them encoding gets the lock
SPACED = bytes.maketrans(b",", b" ")

Fields = Sequence[bytes | None]


@dataclass(frozen=True)
class Embeddings:
    """Rows of an embedding file.

    :param vectors: float32, rows × dimensions.
    :param columns: the other columns, one text (None for null) a row.
    :param rows: number of each row in the file, from 0. Rows without a vector are left out, unless asked for: then
        their vector is NaN.
    :param total: rows that were read, those without a vector included.
    """

    vectors: Vectors
    columns: dict[str, list[str | None]]
    rows: NDArray[np.int64]
    total: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Which rows hold a vector."""
        return ~np.isnan(self.vectors[:, 0]) if self.vectors.shape[1] else np.zeros(len(self), dtype=bool)


def size_of(path: Path) -> int:
    """Bytes of an embedding file, and of the columns beside it."""
    files = [path, ids_path(path)] if ending_of(path) == NPY else [path]
    return sum(file.stat().st_size for file in files if file.exists())


def files_of(path: str | Path) -> list[Path]:
    """The files that are read for an embedding file, those beside it too, whether they are there or not."""
    return [Path(path), _beside(path, manifest_path), _beside(path, ids_path)]


def ending_of(path: str | Path) -> str:
    """The ending that says which format an embedding file has, in lower case; `.txt` where a name has none of them."""
    ending = Path(path).suffix.lower()
    return ending if ending in ENDINGS else TEXT


def is_text(path: str | Path) -> bool:
    """Whether the kept columns of an embedding file are delimited text, which cannot hold every value."""
    return ending_of(path) != PARQUET


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of an embedding file lies: beside it, with `.json` put behind its whole name."""
    return Path(f"{path}.json")


def read_manifest(path: str | Path) -> dict[str, Any] | None:
    """The manifest of an embedding file, or None where there is none.

    :raises DataError: there is one and it cannot be read.
    """
    place = _beside(path, manifest_path)
    if not place.is_file():
        return None
    try:
        manifest = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{place} is no readable manifest ({error}); remove it, or {AGAIN}") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{place}: wanted a JSON object, found {type(manifest).__name__}; {AGAIN}")
    return manifest


def _beside(path: str | Path, place_of: Callable[[str | Path], Path]) -> Path:
    """A file that lies beside an embedding file; of a link, beside what it leads to where the link has none itself."""
    here = place_of(path)
    return here if here.is_file() or not Path(path).is_symlink() else place_of(Path(path).resolve())


# --- reading ------------------------------------------------------------------------------------------------------


def read_embeddings(path: str | Path, columns: Sequence[str] | None = None, *, keep_empty: bool = False) -> Embeddings:
    """Read an embedding file into memory; the format goes by the ending, a folder is read as its part files.

    :param columns: the columns wanted beside the vectors; None reads all of them, () none.
    :param keep_empty: keep rows without a vector, as NaN.
    :raises MissingError: there is no such file.
    :raises DataError: no `vector` column, vectors of different lengths, a value that is no number, an empty file, or
        fewer rows than the manifest says.
    """
    batches = list(iter_embeddings(path, columns, keep_empty=keep_empty))
    total = sum(batch.total for batch in batches)
    if not any(batch.valid.any() for batch in batches):
        raise DataError(f"{path}: none of its {total} rows holds a vector; {AGAIN}")
    names = list(batches[0].columns)
    dim = max(batch.vectors.shape[1] for batch in batches)
    return Embeddings(
        vectors=np.concatenate([_of_width(batch.vectors, dim) for batch in batches if len(batch)]),
        columns={name: [value for batch in batches for value in batch.columns[name]] for name in names},
        rows=np.concatenate([batch.rows for batch in batches]),
        total=total,
    )


def _of_width(vectors: Vectors, dim: int) -> Vectors:
    """Rows that came before the file's first vector have no width yet; they are NaN."""
    return vectors if vectors.shape[1] else np.full((len(vectors), dim), np.nan, dtype=np.float32)


def iter_embeddings(
    path: str | Path, columns: Sequence[str] | None = None, *, keep_empty: bool = False
) -> Iterator[Embeddings]:
    """Read an embedding file a batch at a time, in bounded memory; parameters and errors as `read_embeddings`."""
    from tqdm.auto import tqdm

    path = Path(path)
    manifest = read_manifest(path)
    names = _names_without_header(manifest)
    parts = _parts(path)
    done, dim = 0, None
    with tqdm(total=sum(p.stat().st_size for p in parts), unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for part in parts:
            for size, batch in _format_of(part).batches(part, columns, dim, names):
                dim = dim or batch.vectors.shape[1]
                yield _numbered(batch, done, dim, keep_empty)
                done += batch.total
                bar.update(size)
    if manifest is not None and done != (wanted := manifest.get("rows", {}).get("written", done)):
        raise DataError(
            f"{path} holds {done} rows, its manifest says {wanted}: the file was cut short or replaced; {AGAIN}"
        )


def _names_without_header(manifest: dict[str, Any] | None) -> list[str] | None:
    """The columns of text that has no header row, as its manifest says; None where it has one."""
    settings = (manifest or {}).get("settings") or {}
    return None if settings.get("output_header", True) else [*settings["output_columns"], VECTOR]


def _parts(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    parts = sorted(
        p for p in path.glob(f"{PART_PREFIX}*") if p.suffix.lower() in ENDINGS and not p.name.endswith(".ids.txt")
    )
    if not parts:
        raise MissingError(f"embedding file {path}: there is no such file; run the inference stage first")
    return parts


def _numbered(batch: Embeddings, done: int, dim: int, keep_empty: bool) -> Embeddings:
    """A batch of one part (vectors of valid rows only) as the caller wants it, its rows counted from `done` on."""
    if not keep_empty:
        columns = batch.columns
        if len(batch.rows) < batch.total:
            columns = {name: [values[row] for row in batch.rows] for name, values in columns.items()}
        return Embeddings(batch.vectors, columns, batch.rows + done, batch.total)
    vectors = np.full((batch.total, dim), np.nan, dtype=np.float32)
    vectors[batch.rows] = batch.vectors
    return Embeddings(vectors, batch.columns, np.arange(done, done + batch.total), batch.total)


def _chosen(path: Path, found: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """The columns to read, checked against those that are there."""
    if columns is None:
        return [name for name in found if name != VECTOR]
    if missing := [name for name in columns if name not in found]:
        raise DataError(f"{path}: no column {', '.join(missing)}; its columns are {', '.join(found)}")
    return list(columns)


def _need_vector(path: Path, found: Sequence[str]) -> int:
    if VECTOR not in found:
        shown = ", ".join(name[:40] for name in found[:20]) or "none"
        raise DataError(
            f"{path}: no column `{VECTOR}`; its columns are {shown} (fields are split by \\001). A file without a "
            "header row (output_header: false) needs its manifest beside it, whose name ends in .json"
        )
    return list(found).index(VECTOR)


class _Format(Protocol):
    """One kind of embedding file. `batches` yields (bytes read, rows): all columns' rows, vectors of the valid rows."""

    def batches(
        self, path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
    ) -> Iterator[tuple[int, Embeddings]]: ...

    def sink(
        self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None, header: bool
    ) -> Sink: ...

    def copy_back(self, path: Path, folder: Path) -> dict[str, int]: ...

    def finish(self, folder: Path, place: Path) -> None: ...


def _format_of(path: str | Path) -> _Format:
    formats: dict[str, _Format] = {PARQUET: _Parquet(), NPY: _Npy()}
    return formats.get(ending_of(path), _Text())


# --- text ---------------------------------------------------------------------------------------------------------


def _line_blocks(file: IO[bytes], carriage: bytes) -> Iterator[list[bytes]]:
    """Whole lines of a file, about `BLOCK_BYTES` at a time, without their newlines and the `carriage` before them."""
    while lines := file.readlines(BLOCK_BYTES):
        yield [line.removesuffix(b"\n").removesuffix(carriage) for line in lines]


class _Text:
    def batches(
        self, path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
    ) -> Iterator[tuple[int, Embeddings]]:
        done = 0
        with open(path, "rb") as file:
            head = b"" if names else file.readline()
            if not head and not names:
                raise DataError(f"{path} is empty; {AGAIN}")
            found = (
                list(names)
                if names
                else head.rstrip(b"\r\n").removeprefix(BOM).decode("utf-8", "replace").split("\x01")
            )
            place = _need_vector(path, found)
            wanted = [(name, found.index(name)) for name in _chosen(path, found, columns)]
            yield len(head), Embeddings(np.empty((0, dim or 0), np.float32), {n: [] for n, _ in wanted}, _no_rows(), 0)
            for lines in _line_blocks(file, b"\r" if head.endswith(b"\r\n") else b""):
                fields = [line.split(DELIMITER) for line in lines]
                _check_widths(path, fields, len(found), done - bool(names))
                rows = np.array([i for i, row in enumerate(fields) if row[place]], dtype=np.int64)
                vectors = _parse_vectors(path, [fields[i][place] for i in rows], rows + done, dim)
                dim = dim or vectors.shape[1]
                kept = {name: _texts(path, [row[at] for row in fields]) for name, at in wanted}
                yield sum(map(len, lines)) + len(lines), Embeddings(vectors, kept, rows, len(lines))
                done += len(lines)

    def sink(
        self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None, header: bool
    ) -> Sink:
        return TextSink(folder, columns, sizes, header=header)

    def copy_back(self, path: Path, folder: Path) -> dict[str, int]:
        shutil.copyfile(path, folder / TextSink.NAME)
        return {TextSink.NAME: path.stat().st_size}

    def finish(self, folder: Path, place: Path) -> None:
        _move(folder / TextSink.NAME, place)


def _move(work: Path, place: Path) -> None:
    if work.exists():  # else it was moved before the run was interrupted
        os.replace(work, place)


def _no_rows() -> NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


def _check_widths(path: Path, fields: list[list[bytes]], wanted: int, done: int) -> None:
    wrong = [i for i, row in enumerate(fields) if len(row) != wanted]
    if wrong:
        shown = "; ".join(f"line {done + i + 2} has {len(fields[i])}" for i in wrong[:5])
        raise DataError(
            f"{path}: the header names {wanted} columns, but {shown}; the file was cut short or edited: {AGAIN}"
        )


def _texts(path: Path, values: list[bytes]) -> list[str | None]:
    try:
        return [None if value == NULL else value.decode() for value in values]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); embedding files are UTF-8") from error


@functools.cache
def _float_columns(dim: int) -> dict[str, Any]:
    import polars

    return {str(i): polars.Float32 for i in range(dim)}


def _parse_vectors(path: Path, texts: list[bytes], rows: NDArray[np.int64], dim: int | None) -> Vectors:
    """Parse the decimals of whole rows; polars rounds each to the nearest float32, hence the same bits come back."""
    import polars

    if not texts:
        return np.empty((0, dim or 0), np.float32)
    dim = dim or texts[0].count(b" ") + 1
    try:
        frame = polars.read_csv(
            b"\n".join(texts), has_header=False, separator=" ", schema=_float_columns(dim), quote_char=None
        )
    except polars.exceptions.PolarsError:
        raise _vector_error(path, texts, rows, dim) from None
    vectors = frame.to_numpy(order="c")
    if len(vectors) != len(texts) or not np.isfinite(vectors).all():  # a short row is filled with nulls
        raise _vector_error(path, texts, rows, dim)
    return vectors


def _vector_error(path: Path, texts: list[bytes], rows: NDArray[np.int64], dim: int) -> DataError:
    """Say what is wrong with a block that does not parse: lengths first, then the values that are no numbers."""
    ragged = [(int(row), len(text.split(b" "))) for row, text in zip(rows, texts, strict=True)]
    ragged = [(row, length) for row, length in ragged if length != dim]
    if ragged:
        shown = ", ".join(f"row {row} (line {row + 2}) holds {length}" for row, length in ragged[:5])
        more = f" and {len(ragged) - 5} rows more" if len(ragged) > 5 else ""
        return DataError(
            f"{path}: vectors of different lengths: {dim} numbers in its first row, but {shown}{more}; "
            f"every row needs the same model and truncate_dim: {AGAIN}"
        )
    wrong = [(row, value) for row, text in zip(rows, texts, strict=True) if (value := _no_number(text)) is not None]
    if not wrong:
        return DataError(f"{path}: the vectors of rows {rows[0]} to {rows[-1]} cannot be read")
    shown = ", ".join(f"{value[:40]!r} in row {row} (line {row + 2})" for row, value in wrong[:5])
    more = f" and {len(wrong) - 5} rows more" if len(wrong) > 5 else ""
    return DataError(f"{path}: `{VECTOR}` holds values that are no finite numbers: {shown}{more}; {AGAIN}")


def _no_number(vector: bytes) -> bytes | None:
    """The first of a vector's values that is no finite number."""
    return next((value for value in vector.split(b" ") if not _is_number(value)), None)


def _is_number(value: bytes) -> bool:
    try:
        return bool(np.isfinite(np.float32(float(value))))
    except ValueError:
        return False


# --- Parquet ------------------------------------------------------------------------------------------------------


class _Parquet:
    def batches(
        self, path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
    ) -> Iterator[tuple[int, Embeddings]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a complete Parquet file ({error}); {AGAIN}") from error
        _need_vector(path, file.schema_arrow.names)
        names = _chosen(path, file.schema_arrow.names, columns)
        yield 0, Embeddings(np.empty((0, dim or 0), np.float32), {name: [] for name in names}, _no_rows(), 0)
        share = path.stat().st_size / max(1, file.metadata.num_rows)
        done = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=[*names, VECTOR]):
            column = batch.column(VECTOR)
            rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            vectors = _arrow_vectors(path, column, rows + done, dim)
            dim = dim or vectors.shape[1]
            kept = {name: _arrow_texts(path, name, batch.column(name)) for name in names}
            yield int(share * len(batch)), Embeddings(vectors, kept, rows, len(batch))
            done += len(batch)

    def sink(
        self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None, header: bool
    ) -> Sink:
        return ParquetSink(folder, columns, dim, sizes)

    def copy_back(self, path: Path, folder: Path) -> dict[str, int]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        with open(folder / ParquetSink.NAME, "wb") as work:
            work.write(file.schema_arrow.remove_metadata().serialize())
            for batch in file.iter_batches(BATCH_ROWS):
                work.write(batch.serialize())
        return {ParquetSink.NAME: (folder / ParquetSink.NAME).stat().st_size}

    def finish(self, folder: Path, place: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        new = folder / "rows.parquet"  # not beside `place`, where a kill would leave it
        with pa.OSFile(str(folder / ParquetSink.NAME)) as file:
            stream = pa.ipc.open_stream(file)
            texts = [name for name in stream.schema.names if name != VECTOR]
            # float32 of an embedding does not compress, and reads fastest as it is
            codec = dict.fromkeys(texts, "zstd") | {f"{VECTOR}.list.element": "none"}
            options = {"compression": codec, "use_dictionary": texts, "write_statistics": texts}
            with pq.ParquetWriter(new, stream.schema, **options) as out:
                for batch in stream:
                    out.write_batch(batch)
        os.replace(new, place)


def _arrow_texts(path: Path, name: str, column: pa.Array) -> list[str | None]:
    import pyarrow as pa

    try:
        return column.cast(pa.string()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: column {name} is {column.type}; wanted text, or what can be written as one"
        ) from error


def _arrow_vectors(path: Path, column: pa.Array, rows: NDArray[np.int64], dim: int | None) -> Vectors:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise DataError(f"{path}: `{VECTOR}` is {kind}; wanted lists of float32")
    if not len(rows):
        return np.empty((0, dim or 0), np.float32)
    lengths = pc.list_value_length(column).drop_null().to_numpy(zero_copy_only=False)
    dim = dim or int(lengths[0])
    if (wrong := np.flatnonzero(lengths != dim)).size:
        shown = ", ".join(f"row {rows[i]} holds {lengths[i]}" for i in wrong[:5])
        raise DataError(f"{path}: vectors of different lengths: {dim} numbers in its first row, but {shown}")
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(len(rows), dim)
    _check_finite(path, values, rows)
    return values


def _check_finite(path: Path, vectors: Vectors, rows: NDArray[np.int64]) -> None:
    wrong = rows[~np.isfinite(vectors).all(axis=1)]
    if wrong.size:
        more = f" and {wrong.size - 5} more" if wrong.size > 5 else ""
        raise DataError(
            f"{path}: `{VECTOR}` holds a value that is no finite number in row {', '.join(map(str, wrong[:5]))}{more}; "
            f"{AGAIN}"
        )


# --- npy ----------------------------------------------------------------------------------------------------------


def ids_path(path: str | Path) -> Path:
    """Where the kept columns of an `.npy` file lie: delimited text beside it, row for row."""
    return Path(path).with_suffix(".ids.txt")


class _Npy:
    def batches(
        self, path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
    ) -> Iterator[tuple[int, Embeddings]]:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{path} is not a complete .npy file ({error}); {AGAIN}") from error
        if array.ndim != 2 or array.dtype.kind != "f" or not array.shape[1]:
            raise DataError(f"{path}: wanted floats of rows × dimensions, found {array.dtype} of shape {array.shape}")
        if dim and array.shape[1] != dim:
            raise DataError(f"{path}: vectors of {array.shape[1]} numbers, in the files before it {dim}")
        ids = _read_ids(path, columns, len(array))
        for start in range(0, max(1, len(array)), BATCH_ROWS):
            chunk = np.asarray(array[start : start + BATCH_ROWS], dtype=np.float32)
            rows = np.flatnonzero(~np.isnan(chunk).all(axis=1))
            _check_finite(path, chunk[rows], rows + start)
            kept = {name: values[start : start + BATCH_ROWS] for name, values in ids.items()}
            yield chunk.nbytes, Embeddings(chunk[rows], kept, rows, len(chunk))

    def sink(
        self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None, header: bool
    ) -> Sink:
        return NpySink(folder, columns, dim, sizes)

    def copy_back(self, path: Path, folder: Path) -> dict[str, int]:
        places = {NpySink.NAME: path, TextSink.NAME: ids_path(path)}
        for name, place in places.items():
            shutil.copyfile(place, folder / name)
        return {name: place.stat().st_size for name, place in places.items()}

    def finish(self, folder: Path, place: Path) -> None:
        _move(folder / TextSink.NAME, ids_path(place))
        _move(folder / NpySink.NAME, place)


def _read_ids(path: Path, columns: Sequence[str] | None, rows: int) -> dict[str, list[str | None]]:
    place = _beside(path, ids_path)
    if not place.is_file():
        _chosen(path, [VECTOR], columns)
        return {}
    with open(place, "rb") as file:
        found = file.readline().rstrip(b"\n").decode().split("\x01")
        wanted = _chosen(place, found, columns)
        fields = [line.removesuffix(b"\n").split(DELIMITER) for line in file]
    _check_widths(place, fields, len(found), 0)
    if len(fields) != rows:
        raise DataError(f"{place} holds {len(fields)} rows, {path} {rows}; {AGAIN}")
    return {name: _texts(place, [row[found.index(name)] for row in fields]) for name in wanted}


# --- writing ------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes rows in order into append-only work files, so that an interrupted run can cut them to a known size."""

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows: the kept fields as UTF-8 (None for null), their vectors, and which rows have one."""

    def commit(self) -> dict[str, int]:
        """Bring everything to the disk; returns the size of each work file."""

    def close(self) -> None:
        """Let go of the work files."""


def open_sink(
    place: str | Path,
    folder: Path,
    columns: Sequence[str],
    dim: int,
    sizes: Mapping[str, int] | None = None,
    *,
    header: bool = True,
) -> Sink:
    """Open the work files of an embedding file in `folder`; the ending of `place` says which format.

    :param sizes: what `commit` returned when the run was interrupted; what was written since is cut off.
    :param header: text begins with the names of its columns.
    """
    return _format_of(place).sink(folder, columns, dim, sizes, header)


def finish_sink(place: str | Path, folder: Path) -> None:
    """Move the whole file from its work files to its place. May be called again after it was interrupted."""
    _format_of(place).finish(folder, Path(place))


def reopen(place: str | Path, folder: Path) -> dict[str, int]:
    """Copy a finished embedding file back into work files, to append to them; returns their sizes."""
    return _format_of(place).copy_back(Path(place), folder)


def _open_work(path: Path, sizes: Mapping[str, int] | None) -> IO[bytes]:
    if sizes is None:
        return open(path, "wb")
    file = open(path, "r+b")  # noqa: SIM115 - the sink closes it
    file.truncate(sizes[path.name])
    file.seek(0, os.SEEK_END)
    return file


def _sync(file: IO[bytes]) -> int:
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def _vector_texts(vectors: Vectors) -> list[bytes]:
    """Each row as shortest round-trip decimals (Ryu, through orjson) separated by single spaces."""
    import orjson

    if not len(vectors):
        return []
    listed = orjson.dumps(np.ascontiguousarray(vectors, dtype=np.float32), option=orjson.OPT_SERIALIZE_NUMPY)
    return listed[2:-2].translate(SPACED).split(b"] [")


def _line(fields: Fields) -> bytes:
    return DELIMITER.join([NULL if field is None else field for field in fields])


class TextSink:
    """Delimited text, with a header row where it is wanted: the kept columns, then the vector."""

    NAME = "rows.txt"

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        sizes: Mapping[str, int] | None,
        with_vector: bool = True,
        header: bool = True,
    ) -> None:
        self._path = folder / self.NAME
        self._file = _open_work(self._path, sizes)
        if sizes is None and header:
            names = [*columns, VECTOR] if with_vector else list(columns)
            self._file.write("\x01".join(names).encode() + b"\n")

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows as lines; see `Sink`."""
        for start in range(0, len(rows), FORMAT_ROWS):
            part = slice(start, start + FORMAT_ROWS)
            texts = iter(_vector_texts(vectors[part][valid[part]]))
            filled = zip(rows[part], valid[part].tolist(), strict=True)
            lines = [_line([*row, next(texts) if has_one else b""]) for row, has_one in filled]
            self._file.write(b"\n".join(lines) + b"\n")

    def append_fields(self, rows: Sequence[Fields]) -> None:
        """Append rows of a file that holds no vectors."""
        self._file.writelines(_line(row) + b"\n" for row in rows)

    def commit(self) -> dict[str, int]:
        """Bring the lines to the disk; see `Sink`."""
        return {self.NAME: _sync(self._file)}

    def close(self) -> None:
        """Let go of the work file."""
        self._file.close()


class ParquetSink:
    """Parquet cannot be appended to: the rows wait in an Arrow stream, which can, and are converted in the end."""

    NAME = "rows.arrows"

    def __init__(self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None) -> None:
        import pyarrow as pa

        self._path = folder / self.NAME
        self._file = _open_work(self._path, sizes)
        self._dim = dim
        self._schema = pa.schema([*((name, pa.string()) for name in columns), (VECTOR, pa.list_(pa.float32(), dim))])
        if sizes is None:
            self._file.write(self._schema.serialize())

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows as record batches; see `Sink`."""
        import pyarrow as pa

        for start in range(0, len(rows), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            texts = [
                pa.array([row[i] for row in rows[part]], pa.binary()).cast(pa.string())
                for i in range(len(self._schema) - 1)
            ]
            values = pa.array(np.ascontiguousarray(vectors[part], dtype=np.float32).ravel())
            lists = pa.FixedSizeListArray.from_arrays(values, self._dim, mask=pa.array(~valid[part]))
            self._file.write(pa.RecordBatch.from_arrays([*texts, lists], schema=self._schema).serialize())

    def commit(self) -> dict[str, int]:
        """Bring the record batches to the disk; see `Sink`."""
        return {self.NAME: _sync(self._file)}

    def close(self) -> None:
        """Let go of the work file."""
        self._file.close()


class NpySink:
    """A float32 array (NaN where a row has no vector), and the kept columns as text beside it."""

    NAME = "rows.npy"

    def __init__(self, folder: Path, columns: Sequence[str], dim: int, sizes: Mapping[str, int] | None) -> None:
        self._path = folder / self.NAME
        self._file = _open_work(self._path, sizes)
        self._dim = dim
        self._ids = TextSink(folder, columns, sizes, with_vector=False)
        if sizes is None:
            self._file.write(self._header(0))

    def _header(self, rows: int) -> bytes:
        """The header for so many rows; numpy leaves room in it for the first axis to grow, so its size is fixed."""
        import io

        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (rows, self._dim)})
        return head.getvalue()

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows to the array and to the texts beside it; see `Sink`."""
        filled = np.where(valid[:, None], vectors, np.float32("nan")).astype("<f4", copy=False)
        self._file.write(filled.tobytes())
        self._ids.append_fields(rows)

    def commit(self) -> dict[str, int]:
        """Write into the array's header how many rows it has, and bring both files to the disk; see `Sink`."""
        rows = (self._file.tell() - len(self._header(0))) // (4 * self._dim)
        self._file.seek(0)
        self._file.write(self._header(rows))
        self._file.seek(0, os.SEEK_END)
        return {self.NAME: _sync(self._file)} | self._ids.commit()

    def close(self) -> None:
        """Let go of both work files."""
        self._file.close()
        self._ids.close()


def write_embeddings(
    path: str | Path,
    columns: Mapping[str, Sequence[str | None]],
    vectors: Vectors,
    valid: NDArray[np.bool_] | None = None,
) -> Path:
    """Write a whole embedding file at once, in the format of its ending.

    :param columns: the kept columns, each as long as the vectors.
    :param vectors: float32, rows × dimensions.
    :param valid: which rows have a vector; when None, those that are not NaN throughout.
    :raises DataError: a value holds what separates fields or rows, or is `\\N`, in a format that is text.
    """
    path = Path(path)
    if valid is None:
        valid = np.asarray(~np.isnan(vectors).all(axis=1))
    rows = [
        [None if value is None else value.encode() for value in row]
        for _, *row in zip(range(len(vectors)), *columns.values(), strict=True)
    ]
    if is_text(path):
        _check_plain(path, rows)
    with room_beside(path) as folder:
        folder.mkdir()
        sink = open_sink(path, folder, list(columns), vectors.shape[1])
        sink.append(rows, vectors, valid)
        sink.commit()
        sink.close()
        finish_sink(path, folder)
    return path


def is_plain(value: bytes | None) -> bool:
    """Whether delimited text can hold a value: no `\\001` or newline in it, and not what stands for null."""
    return value is None or not (DELIMITER in value or b"\n" in value or value == NULL)


def plain(value: bytes | None) -> bytes | None:
    """A value as delimited text can hold it: a space for each `\\001` or newline; `\\N` alone, which is null there."""
    if value is None or value == NULL:
        return None
    if DELIMITER not in value and b"\n" not in value:
        return value
    return value.replace(b"\r\n", b" ").replace(b"\n", b" ").replace(DELIMITER, b" ")


def _check_plain(path: Path, rows: Iterable[Fields]) -> None:
    for number, row in enumerate(rows):
        for value in row:
            if not is_plain(value):
                raise DataError(f"{path}: row {number}: {value!r} cannot stand in delimited text; write .parquet")
