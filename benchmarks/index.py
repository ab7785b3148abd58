"""Build, measure and search an index of 100,000 × 384, beside the library's exact search; prints Markdown tables.

    python benchmarks/index.py               # 100,000 vectors
    python benchmarks/index.py --quick       # 5,000
    python benchmarks/index.py --milvus      # in Milvus Lite as well
    python benchmarks/index.py --million     # evaluate a corpus of a million vectors, and nothing else

The vectors are drawn with the falling spectrum that embeddings have (variance of axis i as 1 / i), because encoding
that many real texts would take longer than the benchmark; recall on real vectors is what the stage reports. Every
contender lives in a process of its own; a turn is one query, encoded and searched, and a ratio the median of the turns'
ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from contest import MODELS, alone, peak_mb, take_turns

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout

from ebr_lib.data.embeddings.base import BATCH_ROWS, manifest_path
from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.index.run import IndexResult, build_faiss_index
from ebr_lib.index.search import search
from ebr_lib.metrics import evaluate_vectors
from ebr_lib.model.loading import load_model
from ebr_lib.model.packaged import PACKAGED_NAME
from ebr_lib.model.provenance import identify

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


def write_vectors(rows: int, place: Path) -> None:
    """An embedding file as the inference stage writes it."""
    columns = {"id": [str(i) for i in range(rows)], "kind": ["ab"[i % 2] for i in range(rows)]}
    write_embeddings(place, columns, drawn(rows, 0))
    identity = identify(PACKAGED_NAME)
    made_by = {"name": identity.name, "path": identity.path, "sha256": identity.sha256}
    manifest_path(place).write_text(json.dumps({"model": made_by, "dimension": DIM, "rows": {"written": rows}}))


# --- contenders ---------------------------------------------------------------------------------------------------


def by_library(rows: int) -> Callable[[], float]:
    """sentence-transformers alone: encode, then its exact search."""
    import torch
    from sentence_transformers.util import semantic_search

    model, corpus = load_model(PACKAGED_NAME), torch.from_numpy(drawn(rows, 0))

    def find(query: str) -> None:
        semantic_search(model.encode([query], convert_to_tensor=True, show_progress_bar=False).cpu(), corpus, top_k=10)

    return timed(find)


def ours(folder: Path, where: dict[str, Any] | None) -> Callable[[], float]:
    return timed(partial(search, folder, where=where))


def timed(find: Callable[[str], Any]) -> Callable[[], float]:
    """Milliseconds of the next query."""
    queries = cycle(QUERIES)

    def turn() -> float:
        start = time.perf_counter()
        find(next(queries))
        return 1000 * (time.perf_counter() - start)

    return turn


# --- tables -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def milvus_lite(folder: Path) -> Iterator[str]:
    """Address of a server of Milvus Lite: its file alone would serve one contender."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["-m", "milvus_lite", "server", "--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def build(embeddings: Path, folder: Path, **knobs: str) -> tuple[IndexResult, float]:
    """What was built, and the seconds of the whole stage."""
    start = time.perf_counter()
    built = build_faiss_index({"embedding_path": str(embeddings), "output_dir": str(folder), **knobs})
    return built, time.perf_counter() - start


def measure(rows: int, queries: int, folder: Path, milvus_uri: str | None) -> None:
    place = folder / "embeds.parquet"
    write_vectors(rows, place)
    built = {"auto": alone(partial(build, place, folder / "faiss"), MODELS)}
    if milvus_uri:
        knobs = {"kind": "milvus", "milvus_uri": milvus_uri}
        built["Milvus Lite"] = alone(partial(build, place, folder / "milvus", **knobs), MODELS)
    searches: dict[str, Callable[[], Callable[[], float]]] = {"util.semantic_search": partial(by_library, rows)}
    for kind, (result, _) in built.items():
        name = "ours" if kind == "auto" else f"ours, {kind}"
        searches |= {name: partial(ours, result.folder, None)}
        searches |= {f"{name}, filtered to one half": partial(ours, result.folder, {"kind": "a"})}
    turns = take_turns(searches, queries, MODELS)
    print(f"\n{rows:,} × {DIM}; {queries} queries, encoding included\n")
    print("| search | ms (median) | 95th percentile | × first row |\n| --- | ---: | ---: | ---: |")
    base = next(iter(turns.values()))[1:]
    for name, (_, *found) in turns.items():  # the first loads what it needs
        ratio = median(b / s for b, s in zip(base, found, strict=True))
        print(f"| {name} | {median(found):.1f} | {np.percentile(found, 95):.1f} | {ratio:.2f} |")
    for kind, (result, total) in built.items():
        chosen, first = result.chosen, turns["ours" if kind == "auto" else f"ours, {kind}"][0]
        print(f"\n| the index, {result.kind} | |\n| --- | ---: |")
        print(f"| built, s | {result.build_seconds:.1f} |")
        print(f"| with the vectors read and recall measured, s | {total:.1f} |")
        print(f"| recall@10 | {chosen.recall:.4f} |")
        print(f"| median of a query without encoding, ms | {chosen.p50:.2f} |")
        print(f"| bytes a vector | {result.bytes_per_vector:.0f} |")
        print(f"| first search, loads index and model, s | {first / 1000:.1f} |", flush=True)


def evaluate_a_million() -> tuple[float, float, float]:
    """A million documents that are never in memory together: seconds, the process's peak in MB, recall@100."""
    start = time.perf_counter()
    chunks = (drawn(BATCH_ROWS, seed) for seed in range(62))
    values = evaluate_vectors(drawn(1000, 99), chunks, [{i * 1000: 1} for i in range(1000)])
    return time.perf_counter() - start, peak_mb(), float(values["recall@100"].mean())


def measure_a_million() -> None:
    seconds, peak, recall = alone(evaluate_a_million)
    print("\nevaluation, 1,000 queries, 1,015,808 documents\n")
    print("| s, drawing the vectors included | peak GB | recall@100 of a random judgement |\n| ---: | ---: | ---: |")
    print(f"| {seconds:.1f} | {peak / 1024:.2f} | {recall:.4f} |")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="5,000 rows, few queries")
    parser.add_argument("--milvus", action="store_true", help="in Milvus Lite as well")
    parser.add_argument("--million", action="store_true", help="only evaluate a corpus of a million vectors")
    arguments = parser.parse_args(words)
    if arguments.million:
        return measure_a_million()
    rows, queries = (5000, 20) if arguments.quick else (arguments.rows, len(QUERIES))
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        uri = held.enter_context(milvus_lite(folder / "server")) if arguments.milvus else None
        measure(rows, queries, folder, uri)


if __name__ == "__main__":
    main()
