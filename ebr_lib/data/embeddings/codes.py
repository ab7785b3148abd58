"""Vectors in fewer bytes: float16, int8, or one bit per dimension.

int8 and bits are multiplied by a scale to give the vector back. Each vector has its own, which depends on no other
vector: any order of rows, and an interrupted run, give the same bytes; and cosines do not need it, so an engine that
takes int8 or bits ranks by them alone. Bits are packed as `numpy.packbits` packs them, as sentence-transformers
(`ubinary`), Faiss and Milvus do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Vectors
from ebr_lib.data.embeddings.base import AGAIN, SCALE, VECTOR
from ebr_lib.errors import DataError
from ebr_lib.names import VectorType

DTYPES: dict[VectorType, str] = {"float32": "<f4", "float16": "<f2", "int8": "|i1", "binary": "|u1"}
BITS = 8  # per stored number of binary vectors

Codes = NDArray[Any]


def own_columns(vector_type: VectorType) -> tuple[str, ...]:
    """The columns of an embedding file that hold its vectors."""
    return (VECTOR, SCALE) if vector_type in ("int8", "binary") else (VECTOR,)


def stored_width(dim: int, vector_type: VectorType) -> int:
    """Stored numbers per vector.

    :raises ValueError: the bits do not fill whole bytes.
    """
    if vector_type == "binary" and dim % BITS:
        raise ValueError(f"binary vectors of {dim} dimensions do not fill whole bytes")
    return dim // BITS if vector_type == "binary" else dim


def dimensions(width: Any, dtype: np.dtype[Any]) -> Any:
    """Dimensions of vectors that are stored in `width` numbers, one int or an array of them."""
    return width * BITS if dtype == np.uint8 else width


def quantised(vectors: Vectors, valid: NDArray[np.bool_], vector_type: VectorType) -> tuple[Codes, Vectors | None]:
    """Vectors as they are stored, and the scale of each, float32 (rows,); None for floats.

    float16 is rounded to the nearest. int8: the number farthest from 0 becomes 127 or -127. binary: a bit is 1 for a
    number above 0; 1 and 0 stand for 1 and -1, and the mean size of the numbers is the scale that leaves the least
    error (Rastegari et al., "XNOR-Net", ECCV 2016, section 3.1).

    :param valid: which rows have a vector; the others hold anything.
    :raises DataError: a number is too large for float16.
    """
    if vector_type == "float32":
        return vectors.astype(DTYPES[vector_type], copy=False), None
    vectors = np.where(valid[:, None], vectors, np.float32(0))
    sizes = np.abs(vectors)
    if vector_type == "int8":
        scales = sizes.max(axis=1) / np.float32(127)
        codes = np.rint(vectors / np.where(scales > 0, scales, np.float32(1))[:, None])
        return codes.clip(-127, 127).astype(DTYPES[vector_type]), scales
    if vector_type == "binary":
        return np.packbits(vectors > 0, axis=1), sizes.mean(axis=1, dtype=np.float64).astype(np.float32)
    if sizes.max(initial=0) > np.finfo(np.float16).max:
        raise DataError(
            f"a vector holds {sizes.max():.4g}, and float16 numbers up to 65,504; take another vector_type, or "
            "normalised vectors"
        )
    return vectors.astype(DTYPES[vector_type]), None


def restored(codes: Codes, scales: Vectors | None) -> Vectors:
    """The vectors, float32, of what `quantised` returned."""
    if scales is None:
        return codes.astype(np.float32, copy=False)
    if codes.dtype == np.uint8:
        codes = np.unpackbits(codes, axis=1).astype(np.int8) * np.int8(2) - np.int8(1)
    return codes.astype(np.float32) * scales[:, None]


def no_scales(path: object, found: object) -> DataError:
    """The error for whole numbers that cannot be turned into vectors."""
    return DataError(
        f"{path}: `{VECTOR}` is {found}, and there is no column `{SCALE}` to multiply with; {AGAIN}, or write floats"
    )
