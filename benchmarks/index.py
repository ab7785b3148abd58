"""Build, measure and search an index of 100,000 × 384, beside what a user would reach for first.

    python benchmarks/index.py [--rows 100000] [--million]

The vectors are drawn with the falling spectrum that embeddings have (variance of axis i as 1 / i), for encoding so many
real texts takes longer than all that is measured here; recall on real vectors is what the stage itself reports.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from ebr_lib.data.vectors import BATCH_ROWS, manifest_path, write_embeddings
from ebr_lib.index import build_faiss_index, search
from ebr_lib.logs import show_logs
from ebr_lib.model.loading import PACKAGED_NAME, identify, load_model
from ebr_lib.retrieval.metrics import evaluate_vectors
from ebr_lib.tables import Table

DIM = 384
QUERIES = [
    f"{adjective} {thing} for {who}"
    for adjective in ("warm", "cheap", "waterproof", "red", "quiet")
    for thing in ("shoes", "phone case", "frying pan", "blanket", "water heater")
    for who in ("my mother", "running", "a small kitchen", "children")
]


def drawn(rows: int, seed: int) -> np.ndarray:
    """Unit vectors with a falling spectrum: float32, rows × 384."""
    scale = np.sqrt(1 / np.arange(1, DIM + 1, dtype=np.float32))
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM), dtype=np.float32) * scale
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timed(times: list[float]) -> str:
    p50, p95 = np.percentile(times, (50, 95))
    return f"{p50:.1f} / {p95:.1f}"


def index_and_search(rows: int, folder: Path) -> Table:
    vectors = drawn(rows, 0)
    place = folder / "embeds.parquet"
    write_embeddings(place, {"id": [str(i) for i in range(rows)], "kind": ["ab"[i % 2] for i in range(rows)]}, vectors)
    identity = identify(PACKAGED_NAME)
    made_by = {"name": identity.name, "path": identity.path, "sha256": identity.sha256}
    manifest_path(place).write_text(json.dumps({"model": made_by, "dimension": DIM, "rows": {"written": rows}}))
    start = time.perf_counter()
    result = build_faiss_index({"embedding_path": str(place), "output_dir": str(folder / "index")})
    total = time.perf_counter() - start
    start = time.perf_counter()
    search(result.folder, QUERIES[0])
    loading = time.perf_counter() - start
    plain = [search(result.folder, query).milliseconds for query in QUERIES]
    filtered = [search(result.folder, query, where={"kind": "a"}).milliseconds for query in QUERIES]
    return Table(f"{rows:,} × {DIM}", ("", "value"), [
        ("index and measurements, s", f"{total:.1f}"),
        ("of it building, s", f"{result.build_seconds:.1f}"),
        ("recall@10 / bytes a vector", f"{result.chosen.recall:.4f} / {result.bytes_per_vector:.0f}"),
        ("first search: loads index and model, s", f"{loading:.1f}"),
        ("search, encoding included, p50 / p95 ms", timed(plain)),
        ("search filtered to one half, p50 / p95 ms", timed(filtered)),
        ("util.semantic_search, encoding included, p50 / p95 ms", timed(by_library(vectors))),
    ])  # fmt: skip


def by_library(vectors: np.ndarray) -> list[float]:
    """The same with sentence-transformers alone: encode, then its exact search."""
    import torch
    from sentence_transformers.util import semantic_search

    model, corpus, times = load_model(PACKAGED_NAME), torch.from_numpy(vectors), []
    for query in QUERIES:
        start = time.perf_counter()
        semantic_search(model.encode([query], convert_to_tensor=True, show_progress_bar=False), corpus, top_k=10)
        times.append(1000 * (time.perf_counter() - start))
    return times


def evaluate_a_million() -> Table:
    """A million documents that are never in memory together: seconds, and the most memory this process has held."""
    start = time.perf_counter()
    chunks = (drawn(BATCH_ROWS, seed) for seed in range(62))
    values = evaluate_vectors(drawn(1000, 99), chunks, [{i * 1000: 1} for i in range(1000)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Table("evaluation, 1000 queries, 1,015,808 documents", ("", "value"), [
        ("s, drawing the vectors included", f"{time.perf_counter() - start:.1f}"),
        ("peak memory, GB", f"{peak:.2f}"),
        ("recall@100 of a random judgement", f"{values['recall@100'].mean():.4f}"),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument(
        "--million", action="store_true", help="evaluate a corpus of a million vectors, and nothing else"
    )
    arguments = parser.parse_args()
    if arguments.million:
        print(evaluate_a_million())
        return
    show_logs()
    with tempfile.TemporaryDirectory() as folder:
        print(index_and_search(arguments.rows, Path(folder)))


if __name__ == "__main__":
    main()
