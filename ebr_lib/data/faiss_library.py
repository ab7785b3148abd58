"""Faiss, which is installed only where an index is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ebr_lib.extras import require


def load_faiss() -> Any:
    """Import Faiss on first use; untyped, as its own type stubs lack much of it."""
    require("index")
    import faiss

    return faiss


@contextmanager
def one_thread() -> Iterator[None]:
    """Let Faiss run in one thread."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
