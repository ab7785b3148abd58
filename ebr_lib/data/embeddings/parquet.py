"""Embedding files as Parquet."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.embeddings.base import (
    AGAIN,
    BATCH_ROWS,
    SCALE,
    VECTOR,
    Embeddings,
    Fields,
    Sink,
    check_finite,
    choose_columns,
    empty_batch,
    vector_column,
)
from ebr_lib.data.embeddings.codes import DTYPES, dimensions, no_scales, own_columns, quantised, restored, stored_width
from ebr_lib.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


def read_batches(
    path: Path, columns: Sequence[str] | None, dim: int | None, names: Sequence[str] | None
) -> Iterator[tuple[int, Embeddings]]:
    """Batches of a Parquet file; see `files.Reader`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a complete Parquet file ({error}); {AGAIN}") from error
    found = file.schema_arrow.names
    own = _own_columns(path, file.schema_arrow.field(vector_column(path, found)).type, found)
    names = choose_columns(path, found, columns, own)
    yield 0, empty_batch(names, dim)
    share = path.stat().st_size / max(1, file.metadata.num_rows)
    done = 0
    for batch in file.iter_batches(BATCH_ROWS, columns=[*names, *own]):
        column = batch.column(VECTOR)
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        scales = batch.column(SCALE).to_numpy(zero_copy_only=False)[rows] if SCALE in own else None
        vectors = _arrow_vectors(path, column, scales, rows + done, dim)
        dim = dim or vectors.shape[1]
        kept = {name: _arrow_texts(path, name, batch.column(name)) for name in names}
        yield int(share * len(batch)), Embeddings(vectors, kept, rows, len(batch))
        done += len(batch)


def number_bytes(path: Path) -> int:
    """Bytes of each number of the vectors."""
    import pyarrow.parquet as pq

    return int(pq.read_schema(path).field(VECTOR).type.value_type.bit_width) // 8


def _arrow_texts(path: Path, name: str, column: pa.Array) -> list[str | None]:
    import pyarrow as pa

    try:
        return column.cast(pa.string()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: column {name} is {column.type}; wanted text, or what can be written as one"
        ) from error


def _own_columns(path: Path, kind: pa.DataType, found: Sequence[str]) -> tuple[str, ...]:
    """The columns that hold the vectors; checks that their type is one of ours, or any other floats."""
    import pyarrow as pa

    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    coded = lists and kind.value_type in (pa.int8(), pa.uint8())
    if not coded and not (lists and pa.types.is_floating(kind.value_type)):
        raise DataError(f"{path}: `{VECTOR}` is {kind}; wanted lists of float32")
    if coded and SCALE not in found:
        raise no_scales(path, kind)
    return (VECTOR, SCALE) if coded else (VECTOR,)


def _arrow_vectors(path: Path, column: pa.Array, scales: Vectors | None, rows: Ints, dim: int | None) -> Vectors:
    import pyarrow.compute as pc

    if not len(rows):
        return np.empty((0, dim or 0), np.float32)
    codes = column.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(column).drop_null().to_numpy(zero_copy_only=False)
    lengths = dimensions(lengths, codes.dtype)
    dim = dim or int(lengths[0])
    if (wrong := np.flatnonzero(lengths != dim)).size:
        shown = ", ".join(f"row {rows[i]} holds {lengths[i]}" for i in wrong[:5])
        raise DataError(f"{path}: vectors of different lengths: {dim} numbers in its first row, but {shown}")
    values = restored(codes.reshape(len(rows), -1), scales)
    check_finite(path, values, rows)
    return values


class ParquetSink(Sink):
    """Parquet cannot be appended to: the rows wait in an Arrow stream, which can, and are converted in the end."""

    NAME = "rows.arrows"
    PLACES = {NAME: Path}  # noqa: RUF012 - not changed

    @functools.cached_property
    def _schema(self) -> pa.Schema:
        import pyarrow as pa

        texts = ((name, pa.string()) for name in self.columns)
        codes = pa.from_numpy_dtype(DTYPES[self.vector_type])
        scale = ((name, pa.float32()) for name in own_columns(self.vector_type)[1:])
        return pa.schema([*texts, (VECTOR, pa.list_(codes, stored_width(self.dim, self.vector_type))), *scale])

    def begin(self, header: bool) -> None:
        """Write the columns and their types."""
        self.files[self.NAME].write(self._schema.serialize())

    def append(self, rows: Sequence[Fields], vectors: Vectors, valid: NDArray[np.bool_]) -> None:
        """Append rows as record batches; see `Sink`."""
        import pyarrow as pa

        for start in range(0, len(rows), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            texts = [
                pa.array([row[i] for row in rows[part]], pa.binary()).cast(pa.string())
                for i in range(len(self.columns))
            ]
            codes, scales = quantised(vectors[part], valid[part], self.vector_type)
            values = pa.array(np.ascontiguousarray(codes).ravel())
            own = [pa.FixedSizeListArray.from_arrays(values, codes.shape[1], mask=pa.array(~valid[part]))]
            if scales is not None:
                own.append(pa.array(scales, mask=~valid[part]))
            batch = pa.RecordBatch.from_arrays([*texts, *own], schema=self._schema)
            self.files[self.NAME].write(batch.serialize())

    @classmethod
    def reopen(cls, place: Path, folder: Path) -> dict[str, int]:
        """Turn a finished file into an Arrow stream again; see `Sink`."""
        import pyarrow.parquet as pq

        file = pq.ParquetFile(place)
        with open(folder / cls.NAME, "wb") as work:
            work.write(file.schema_arrow.remove_metadata().serialize())
            for batch in file.iter_batches(BATCH_ROWS):
                work.write(batch.serialize())
            return {cls.NAME: work.tell()}

    @classmethod
    def finish(cls, folder: Path, place: Path) -> None:
        """Convert the Arrow stream, and move the file to its place; see `Sink`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        new = folder / "rows.parquet"  # not beside `place`, where a kill would leave it
        with pa.OSFile(str(folder / cls.NAME)) as file:
            stream = pa.ipc.open_stream(file)
            texts = [field.name for field in stream.schema if field.type == pa.string()]
            # an embedding does not compress, and reads fastest as it is
            codec = dict.fromkeys(texts, "zstd") | {f"{VECTOR}.list.element": "none", SCALE: "none"}
            options = {"compression": codec, "use_dictionary": texts, "write_statistics": texts}
            with pq.ParquetWriter(new, stream.schema, **options) as out:
                for batch in stream:
                    out.write_batch(batch)
        os.replace(new, place)
