"""Read and write embedding files, whatever their format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Vectors
from ebr_lib.data.embeddings import npy, parquet, text
from ebr_lib.data.embeddings.base import (
    AGAIN,
    ENDINGS,
    NPY,
    PARQUET,
    PART_PREFIX,
    VECTOR,
    Embeddings,
    Sink,
    ending_of,
    ids_path,
    is_plain,
    is_text,
    manifest_path,
    place_beside,
    read_manifest,
)
from ebr_lib.errors import DataError, MissingError
from ebr_lib.files import room_beside
from ebr_lib.names import VectorType

Reader = Callable[
    [Path, "Sequence[str] | None", "int | None", "Sequence[str] | None"], Iterator[tuple[int, Embeddings]]
]
"""Reads a file, with the columns wanted (None for all), the dimensions of the files before it, and the names of the
columns where the file has no header. Yields bytes read, and rows: all columns' rows, vectors of the valid rows."""


def _format_of(path: str | Path) -> tuple[Reader, type[Sink]]:
    formats: dict[str, tuple[Reader, type[Sink]]] = {
        PARQUET: (parquet.read_batches, parquet.ParquetSink),
        NPY: (npy.read_batches, npy.NpySink),
    }
    return formats.get(ending_of(path), (text.read_batches, text.TextSink))


def size_of(path: Path) -> int:
    """Bytes of an embedding file, and of the columns beside it."""
    files = [path, ids_path(path)] if ending_of(path) == NPY else [path]
    return sum(file.stat().st_size for file in files if file.exists())


def files_of(path: str | Path) -> list[Path]:
    """The files that reading an embedding file takes, including those beside it, whether or not they exist."""
    return [Path(path), place_beside(path, manifest_path), place_beside(path, ids_path)]


def read_embeddings(path: str | Path, columns: Sequence[str] | None = None, *, keep_empty: bool = False) -> Embeddings:
    """Read an embedding file into memory; the format goes by the ending, a folder is read as its part files.

    :param columns: the columns wanted beside the vectors; None reads all of them, () none.
    :param keep_empty: keep rows without a vector, as NaN.
    :raises MissingError: there is no such file.
    :raises DataError: no `vector` column, vectors of different lengths, non-finite values, an empty file, or fewer rows
        than the manifest says.
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
    """Vectors of `dim`: NaN for rows before the file's first vector, whose width was not known yet."""
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
            for size, batch in _format_of(part)[0](part, columns, dim, names):
                dim = dim or batch.vectors.shape[1]
                yield _numbered(batch, done, dim, keep_empty)
                done += batch.total
                bar.update(size)
    if manifest is not None and done != (wanted := manifest.get("rows", {}).get("written", done)):
        raise DataError(
            f"{path} holds {done} rows, its manifest says {wanted}: the file was cut short or replaced; {AGAIN}"
        )


def is_exact(path: str | Path) -> bool:
    """Whether an embedding file holds float32, and not numbers of fewer bytes."""
    part = _parts(Path(path))[0]
    stored = {PARQUET: parquet.number_bytes, NPY: npy.number_bytes}.get(ending_of(part))
    return stored is None or stored(part) >= 4


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
        raise MissingError(f"embedding file {path}: there is no such file; write it first")
    return parts


def _numbered(batch: Embeddings, done: int, dim: int, keep_empty: bool) -> Embeddings:
    """A batch of one part as the caller wants it, with rows numbered from `done` on."""
    if not keep_empty:
        columns = batch.columns
        if len(batch.rows) < batch.total:
            columns = {name: [values[row] for row in batch.rows] for name, values in columns.items()}
        return Embeddings(batch.vectors, columns, batch.rows + done, batch.total)
    vectors = np.full((batch.total, dim), np.nan, dtype=np.float32)
    vectors[batch.rows] = batch.vectors
    return Embeddings(vectors, batch.columns, np.arange(done, done + batch.total), batch.total)


def open_sink(
    place: str | Path,
    folder: Path,
    columns: Sequence[str],
    dim: int,
    sizes: Mapping[str, int] | None = None,
    *,
    header: bool = True,
    vector_type: VectorType = "float32",
) -> Sink:
    """Open the work files of an embedding file in `folder`, in the format of the ending of `place`; see `Sink`.

    :raises ValueError: the format does not hold such numbers.
    """
    if vector_type != "float32" and ending_of(place) not in (PARQUET, NPY):
        raise ValueError(f"{place}: text holds float32, not {vector_type}")
    return _format_of(place)[1](folder, columns, dim, sizes, header=header, vector_type=vector_type)


def finish_sink(place: str | Path, folder: Path) -> None:
    """Turn whole work files into the embedding file; see `Sink.finish`."""
    _format_of(place)[1].finish(folder, Path(place))


def reopen(place: str | Path, folder: Path) -> dict[str, int]:
    """Turn an embedding file into work files again, to append to it; see `Sink.reopen`."""
    return _format_of(place)[1].reopen(Path(place), folder)


def write_embeddings(
    path: str | Path,
    columns: Mapping[str, Sequence[str | None]],
    vectors: Vectors,
    valid: NDArray[np.bool_] | None = None,
    vector_type: VectorType = "float32",
) -> Path:
    """Write a whole embedding file at once, in the format of its ending.

    :param columns: the kept columns, each as long as the vectors.
    :param vectors: float32, rows × dimensions.
    :param valid: which rows have a vector; None takes those that are not all NaN.
    :param vector_type: numbers to store; text holds float32 only.
    :raises DataError: a value holds what separates fields or rows, or is `\\N`, in a format that is text.
    """
    path = Path(path)
    if valid is None:
        valid = np.asarray(~np.isnan(vectors).all(axis=1))
    rows = [
        [None if value is None else value.encode() for value in row]
        for _, *row in zip(range(len(vectors)), *columns.values(), strict=True)
    ]
    if is_text(path) and (bad := next(((n, v) for n, row in enumerate(rows) for v in row if not is_plain(v)), None)):
        raise DataError(f"{path}: row {bad[0]}: {bad[1]!r} cannot stand in delimited text; write .parquet")
    with room_beside(path) as folder:
        folder.mkdir()
        with contextlib.closing(
            open_sink(path, folder, list(columns), vectors.shape[1], vector_type=vector_type)
        ) as sink:
            sink.append(rows, vectors, valid)
            sink.commit()
        finish_sink(path, folder)
    return path
