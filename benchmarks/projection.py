"""How fast maps are drawn and numbers computed, beside umap-learn, openTSNE and scikit-learn; prints a Markdown table.

    python benchmarks/projection.py                       # 5,000, 20,000 and 100,000 vectors
    python benchmarks/projection.py --quick               # 2,000, one run each
    python benchmarks/projection.py --sizes 20000 --only umap tsne --rounds 3

The vectors are those that MiniLM gives to real sentences: the documentation of the Python packages that are installed
here. Every contender runs in a process of its own, imports and compilation included, as somebody waits for it once.
Trustworthiness and the share of the 15 nearest neighbours kept are judged after the clock has stopped. Contenders
take turns within a round; times are medians, ratios medians of the rounds' ratios. CPU is the processor's time, which
other work on the machine disturbs less than the clock's.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout

Vectors = NDArray[np.float32]
KEPT = Path(tempfile.gettempdir()) / "ebr-benchmark-projection"
SEED = 42


# --- real vectors -------------------------------------------------------------------------------------------------


def sentences(most: int) -> list[str]:
    """Sentences of the docstrings of installed packages, each once, in an order that is always the same."""
    places = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    files = sorted({file for place in places for file in place.rglob("*.py")})
    random.Random(0).shuffle(files)
    found: dict[str, None] = {}
    for file in files:
        found |= dict.fromkeys(_of_file(file))
        if len(found) >= most:
            break
    return list(found)[:most]


def _of_file(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            for piece in re.split(r"(?<=[.!?])\s+|\n\n", ast.get_docstring(node) or "")[:3]:
                if 20 < len(sentence := " ".join(piece.split())) < 300:
                    yield sentence


def vectors_file(rows: int) -> Path:
    """Encode so many sentences once; the file is kept for the next run."""
    path = KEPT / f"minilm-{rows}.npy"
    if not path.is_file():
        from ebr_lib.model.loading import load_model

        KEPT.mkdir(exist_ok=True)
        model = load_model("all-MiniLM-L6-v2", max_seq_length=64)
        texts = sentences(rows)
        print(f"encoding {len(texts)} sentences once", file=sys.stderr)
        found = model.encode(texts, batch_size=256, normalize_embeddings=True, show_progress_bar=True)
        np.save(path, found.astype(np.float32))
    return path


# --- contenders: each takes the vectors and returns the maps that it drew -----------------------------------------


def _pca50(x: Vectors) -> Vectors:
    from sklearn.decomposition import PCA

    return PCA(50, random_state=SEED).fit_transform(x)


def umap_learn(x: Vectors) -> dict[str, Any]:
    import umap

    return {"umap": umap.UMAP().fit_transform(_pca50(x))}


def umap_learn_seeded(x: Vectors) -> dict[str, Any]:
    import umap

    return {"umap": umap.UMAP(random_state=SEED).fit_transform(_pca50(x))}


def open_tsne(x: Vectors) -> dict[str, Any]:
    import openTSNE

    return {"tsne": openTSNE.TSNE(n_jobs=-1, random_state=SEED).fit(_pca50(x))}


def sklearn_tsne(x: Vectors) -> dict[str, Any]:
    from sklearn.manifold import TSNE

    return {"tsne": TSNE(n_jobs=-1, random_state=SEED).fit_transform(_pca50(x))}


def _ours(x: Vectors, *, tsne: bool, umap: bool, seed: int | None = SEED) -> dict[str, Any]:
    from ebr_lib.view import projection

    start = time.perf_counter()
    neighbours = projection.exact_neighbours(x, 90 if tsne else 15)
    first, maps = projection.pca_map(x), {}
    parts = {"neighbours_s": time.perf_counter() - start}
    if tsne:
        maps["tsne"] = projection.tsne_map(neighbours, first, perplexity=30, learning_rate=None, seed=SEED)
        parts["tsne_s"] = time.perf_counter() - start - sum(parts.values())
    if umap:
        maps["umap"] = projection.umap_map(x, neighbours, first, n_neighbors=15, min_dist=0.1, seed=seed)
        parts["umap_s"] = time.perf_counter() - start - sum(parts.values())
    return maps | {"parts": parts}


def ours_umap(x: Vectors) -> dict[str, Any]:
    return _ours(x, tsne=False, umap=True)


def ours_umap_fast(x: Vectors) -> dict[str, Any]:
    return _ours(x, tsne=False, umap=True, seed=None)


def ours_tsne(x: Vectors) -> dict[str, Any]:
    return _ours(x, tsne=True, umap=False)


def ours_both(x: Vectors) -> dict[str, Any]:
    return _ours(x, tsne=True, umap=True)


CONTENDERS: dict[str, Callable[[Vectors], dict[str, Any]]] = {
    "umap-learn, PCA 50": umap_learn,
    "umap-learn, PCA 50, seeded": umap_learn_seeded,
    "ours: umap": ours_umap,
    "ours: umap, fast": ours_umap_fast,
    "ours: tsne": ours_tsne,
    "ours: both": ours_both,
    "openTSNE, PCA 50": open_tsne,
    "scikit-learn t-SNE, PCA 50": sklearn_tsne,
}
BASE = "umap-learn, PCA 50"
SLOW = {"scikit-learn t-SNE, PCA 50": 20_000}  # rows from which it is not waited for


def run_one(name: str, rows: int, whole: int) -> None:
    """The child process: draw, stop the clock, judge, print one line of JSON."""
    x = np.load(vectors_file(whole))[:rows]
    before = time.process_time()
    start = time.perf_counter()
    drawn = CONTENDERS[name](x)
    found: dict[str, Any] = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - before}
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found |= drawn.pop("parts", {})
    from ebr_lib.view import projection

    ready = KEPT / f"neighbours-{whole}-{rows}.npy"
    if not ready.is_file():
        np.save(ready, projection.exact_neighbours(x, 15).indices)
    neighbours = projection.Neighbours(np.load(ready), np.empty(0, np.float32))
    for kind, coords in drawn.items():
        quality = projection.map_quality(x, neighbours, np.asarray(coords, np.float32), SEED)
        found |= {f"{kind}_trust": quality.trustworthiness, f"{kind}_kept": quality.neighbours_kept}
    print(json.dumps(found))


def _cold(name: str, rows: int, whole: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, "--sizes", str(rows), "--whole", str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} at {rows}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def maps_table(rows: int, names: list[str], rounds: int, whole: int) -> None:
    print(f"\n### {rows:,} vectors\n")
    columns = [
        "contender",
        "s",
        "CPU s",
        "x umap-learn",
        "x CPU",
        "peak MB",
        "t-SNE trust",
        "kept",
        "UMAP trust",
        "kept",
    ]
    print("| " + " | ".join([*columns, "parts"]) + " |\n|" + " --- |" * (len(columns) + 1))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(_cold(name, rows, whole))
    for name, found in runs.items():
        print("| " + " | ".join(_cells(name, found, runs.get(BASE))) + " |", flush=True)


def _cells(name: str, found: list[dict[str, float]], base: list[dict[str, float]] | None) -> list[str]:
    def mid(key: str, form: str) -> str:
        return format(median(run[key] for run in found), form) if key in found[0] else ""

    def ratio(key: str) -> str:
        return f"{median(a[key] / b[key] for a, b in zip(found, base, strict=True)):.2f}" if base else ""

    parts = ", ".join(
        f"{key[:-2]} {mid(key, '.1f')}" for key in ("neighbours_s", "tsne_s", "umap_s") if key in found[0]
    )
    shares = [mid(f"{kind}_{what}", ".3f") for kind in ("tsne", "umap") for what in ("trust", "kept")]
    return [
        name,
        mid("s", ".1f"),
        mid("cpu_s", ".1f"),
        ratio("s"),
        ratio("cpu_s"),
        mid("peak_mb", ".0f"),
        *shares,
        parts,
    ]


# --- numbers ------------------------------------------------------------------------------------------------------


def numbers_table(x: Vectors, rounds: int) -> None:
    """The exact cosine silhouette beside scikit-learn's, on 50 k-means clusters."""
    from sklearn.metrics import silhouette_score

    from ebr_lib.view import clusters

    codes = clusters.find_clusters(x, 50, 0, SEED).codes
    times: dict[str, list[float]] = {"ours": [], "scikit-learn": []}
    values = {}
    contenders: dict[str, Callable[[], float]] = {
        "ours": lambda: clusters.separation(x, codes).silhouette,  # type: ignore[union-attr]
        "scikit-learn": lambda: float(silhouette_score(x, codes, metric="cosine")),
    }
    for _ in range(rounds):
        for name, score in contenders.items():
            start = time.perf_counter()
            values[name] = score()
            times[name].append(time.perf_counter() - start)
    gain = median(b / a for a, b in zip(times["ours"], times["scikit-learn"], strict=True))
    print(f"\n### Cosine silhouette of {len(x):,} vectors in 50 clusters (ours with two more scores)\n")
    print("| | s | value |\n| --- | --- | --- |")
    for name, spent in times.items():
        print(f"| {name} | {median(spent):.3f} | {values[name]:.9f} |")
    print(f"\nfaster by a factor of {gain:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000, 20_000, 100_000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name holds one of these words")
    parser.add_argument("--quick", action="store_true", help="2,000 vectors, one round")
    parser.add_argument("--no-numbers", action="store_true", help="maps only")
    parser.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--whole", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(given.one, given.sizes[0], given.whole)
        return
    sizes, rounds = ([2000], 1) if given.quick else (given.sizes, given.rounds)
    x = np.load(vectors_file(whole := max(sizes)))
    if not given.no_numbers:
        numbers_table(x[:20_000], 3)
    for rows in sizes:
        names = [n for n in CONTENDERS if any(word in n for word in given.only) and rows <= SLOW.get(n, rows)]
        maps_table(rows, names, rounds, whole)


if __name__ == "__main__":
    main()
