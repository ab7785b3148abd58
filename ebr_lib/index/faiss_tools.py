"""Faiss, as several parts of the index use it.

A GPU build of Faiss, if installed, trains cells, assigns vectors to them and searches exactly for the measurement;
the index itself stays on the CPU, so that every machine can load it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.faiss_library import load_faiss

REFINE_FACTOR = 16.0  # candidates per result that compressed vectors hand to re-ranking


# --- the kind -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A Faiss factory string, why it was chosen, and the knob that trades speed for recall (None: exact)."""

    factory: str
    why: str
    knob: str | None

    def settings(self, cells: int) -> list[int]:
        """Values of the knob to try, cheapest first."""
        if self.knob is None:
            return [0]
        if self.knob == "efSearch":
            return [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048]
        return [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n < cells] + [cells]


def searched_part(index: Any) -> Any:
    """The part of an index that is searched first: after its transforms, before re-ranking."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return searched_part(index.index)
    return searched_part(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def comparable_vectors(index: Any) -> Any:
    """The part of an index that holds every vector in one place: after its transforms, its re-ranking, its graph."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return comparable_vectors(index.index)
    if isinstance(index, faiss.IndexRefine):
        return comparable_vectors(index.refine_index)
    return faiss.downcast_index(getattr(index, "storage", index))


def cells_of(index: Any) -> int:
    """Cells of an inverted file, 0 for other kinds."""
    faiss = load_faiss()
    if not isinstance(index, faiss.Index):
        return int(index.cells)
    ivf = faiss.try_extract_index_ivf(index)
    return ivf.nlist if ivf is not None else 0


def adding(index: Any) -> Callable[[Vectors], None]:
    """A function that adds unit vectors to the index. It finds their cells on the GPUs, if Faiss has any and the index
    is a plain inverted file."""
    faiss = load_faiss()
    if not (faiss.get_num_gpus() and isinstance(index, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer)):
        return index.add
    from faiss.contrib.ivf_tools import add_preassigned

    centroids = faiss.index_cpu_to_all_gpus(faiss.downcast_index(index.quantizer))

    def add(vectors: Vectors) -> None:
        _, cells = centroids.search(vectors, 1)
        add_preassigned(index, vectors, cells[:, 0])

    return add


def flat_of(index: Any) -> Any:
    """The part of an index that holds the vectors uncompressed, or None."""
    faiss = load_faiss()
    held = faiss.downcast_index(getattr(index, "storage", index))
    return held if isinstance(held, faiss.IndexFlat) else None


def search_parameters(index: Any, knob: str | None, setting: int) -> Any:
    """Faiss's parameters for one search with a setting of the knob."""
    faiss = load_faiss()
    inner = None
    if knob == "efSearch":
        inner = faiss.SearchParametersHNSW(efSearch=setting)
    if knob == "nprobe":
        inner = faiss.SearchParametersIVF(nprobe=setting)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        return faiss.IndexRefineSearchParameters(k_factor=REFINE_FACTOR, base_index_params=inner)
    return inner


def transformed(index: Any, query: Vectors) -> Vectors:
    """A query after the transforms of an index."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexPreTransform):
        return query
    for i in range(index.chain.size()):
        query = index.chain.at(i).apply(query[None, :])[0]
    return transformed(index.index, query)


def of_all_cells(index: Any, allowed: Any) -> Any:
    """Parameters of a search in all cells, among the allowed rows."""
    faiss = load_faiss()
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=index.nlist, sel=allowed)
    return faiss.SearchParameters(sel=allowed)


def reconstructed(index: Any, ids: Ints) -> Vectors:
    """Vectors as the index holds them."""
    faiss = load_faiss()
    ivf = faiss.try_extract_index_ivf(index) if isinstance(index, faiss.Index) else None
    if ivf is not None and ivf.direct_map.no():
        ivf.make_direct_map()  # without it an inverted file cannot give back single vectors
    vectors: Vectors = index.reconstruct_batch(ids)
    return vectors
