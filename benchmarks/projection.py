"""Speed of maps and their numbers beside umap-learn, openTSNE and scikit-learn, as Markdown tables.

    python benchmarks/projection.py                            # 5,000, 20,000 and 100,000 vectors: about 40 minutes
    python benchmarks/projection.py --main                     # fewer contenders: ours, umap-learn, openTSNE
    python benchmarks/projection.py --quick                    # 1,000, one round of umap-learn and ours
    python benchmarks/projection.py --sizes 20000 --only umap  # contenders with the word in their name
    python benchmarks/projection.py --stage 1000000            # the whole stage on a million vectors: time and memory

The vectors are MiniLM's of real sentences: the documentation of the installed Python packages, without duplicates. Each
contender has its own process, and its time includes imports and compilation, as for a user. Afterwards the same
functions compute trustworthiness and the share of the 15 nearest neighbours kept, both against neighbours among the
384-dimensional vectors. Contenders take turns in each round; times are medians, ratios medians of the rounds' ratios.

Each run is a line of `runs.jsonl` in the cache folder, and is not repeated: an interrupted benchmark continues.
`--again` repeats the chosen runs.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from contest import peak_mb, take_turns
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout

Vectors = NDArray[np.float32]
Codes = NDArray[np.int64]
Run = dict[str, Any]
Score = tuple[float, float]  # seconds, value
CACHE = Path(tempfile.gettempdir()) / "ebr-benchmark-projection"
SEED = 42
ROUNDS = {5000: 3}  # else: one
PATIENCE = 1200  # seconds after which a contender is stopped


# --- real vectors -------------------------------------------------------------------------------------------------


def sentences(most: int) -> list[str]:
    """Sentences of the docstrings of installed packages, shuffled, without duplicates."""
    places = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    files = sorted({file for place in places for file in place.rglob("*.py")})
    random.Random(0).shuffle(files)
    found: dict[str, None] = {}
    for file in files:
        found |= dict.fromkeys(_of_file(file))
        if len(found) >= most:
            break
    chosen = list(found)[:most]
    random.Random(1).shuffle(chosen)
    return chosen


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


def vectors_file(rows: int, cache: Path) -> Path:
    """A file with unit vectors of at least `rows` sentences, encoded once, and the sentences beside it."""
    there = {int(path.stem.rpartition("-")[2]): path for path in cache.glob("minilm-*.npy")}
    path = there.get(min((n for n in there if n >= rows), default=0), cache / f"minilm-{rows}.npy")
    if not path.is_file():
        from ebr_lib.data.embeddings.files import write_embeddings
        from ebr_lib.model.encoder import Encoder
        from ebr_lib.model.loading import load_model

        cache.mkdir(parents=True, exist_ok=True)
        texts = sentences(rows)
        if len(texts) < rows:
            raise SystemExit(f"the packages here hold {len(texts):,} sentences, fewer than --sizes {rows:,}")
        vectors = Encoder(load_model("all-MiniLM-L6-v2")).encode(texts, show_bar=True)
        write_embeddings(path, {"description": texts}, vectors)
    return path


# --- contenders: functions from vectors to maps ------------------------------------------------------------------


def _pca50(x: Vectors) -> Vectors:
    from sklearn.decomposition import PCA

    return PCA(50, random_state=SEED).fit_transform(x)


def umap_learn(x: Vectors, seed: int | None = None) -> Run:
    import umap

    return {"umap": umap.UMAP(random_state=seed).fit_transform(_pca50(x))}


def umap_learn_seeded(x: Vectors) -> Run:
    return umap_learn(x, SEED)


def open_tsne(x: Vectors) -> Run:
    import openTSNE

    return {"tsne": openTSNE.TSNE(n_jobs=-1, random_state=SEED).fit(x)}


def open_tsne_pca50(x: Vectors) -> Run:
    return open_tsne(_pca50(x))


def sklearn_tsne(x: Vectors) -> Run:
    from sklearn.manifold import TSNE

    return {"tsne": TSNE(n_jobs=-1, random_state=SEED).fit_transform(_pca50(x))}


def _ours(x: Vectors, *methods: str, seed: int | None = SEED) -> Run:
    from ebr_lib.visualize import projection

    start, found, parts = time.perf_counter(), {}, {}

    def lap(part: str) -> None:
        parts[part] = time.perf_counter() - start - sum(parts.values())

    first = projection.pca_map(x)
    if "tsne" in methods:
        neighbours = projection.exact_neighbours(x, 90)
        lap("neighbours")
        found["tsne"] = projection.tsne_map(neighbours, first, perplexity=30, learning_rate="auto", seed=SEED)
        lap("t-SNE")
    if "umap" in methods:
        neighbours = projection.component_neighbours(x, 14)
        lap("neighbours on PCA 50")
        found["umap"] = projection.umap_map(neighbours, first, n_neighbors=15, min_dist=0.1, seed=seed)
        lap("UMAP")
    return found | {"parts": parts}


def ours_umap(x: Vectors) -> Run:
    return _ours(x, "umap")


def ours_umap_fast(x: Vectors) -> Run:
    return _ours(x, "umap", seed=None)


def ours_tsne(x: Vectors) -> Run:
    return _ours(x, "tsne")


def ours_both(x: Vectors) -> Run:
    return _ours(x, "tsne", "umap")


BASE = "umap-learn, PCA 50"
CONTENDERS: dict[str, Callable[[Vectors], Run]] = {
    BASE: umap_learn,
    "umap-learn, PCA 50, seeded": umap_learn_seeded,
    "ours: UMAP": ours_umap,
    "ours: UMAP, fast": ours_umap_fast,
    "ours: t-SNE": ours_tsne,
    "ours: both": ours_both,
    "openTSNE": open_tsne,
    "openTSNE, PCA 50": open_tsne_pca50,
    "scikit-learn t-SNE, PCA 50": sklearn_tsne,
}
MAIN = (BASE, "ours: UMAP", "ours: UMAP, fast", "ours: t-SNE", "openTSNE")
QUICK = (BASE, "ours: both")
SLOW = {"scikit-learn t-SNE, PCA 50": 20_000}  # most rows that it is run on


# --- the processes ------------------------------------------------------------------------------------------------


def run_one(name: str, rows: int, vectors: Path) -> None:
    """A map's process: draw, stop the clock, judge, print one line of JSON."""
    x = np.load(vectors)[:rows]
    before, start = time.process_time(), time.perf_counter()
    drawn = CONTENDERS[name](x)
    found: Run = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - before, "peak_mb": peak_mb()}
    found["parts"] = drawn.pop("parts", {})
    from ebr_lib.visualize import projection

    neighbours = projection.Neighbours(np.load(_judge_file(rows, vectors)), np.empty(0, np.float32))
    for kind, coords in drawn.items():
        quality = projection.map_quality(x, neighbours, np.asarray(coords, np.float32), SEED)
        found |= {f"{kind} trust": quality.trustworthiness, f"{kind} kept": quality.neighbours_kept}
    print(json.dumps(found))


def run_stage(rows: int, vectors: Path) -> None:
    """In a process of its own: run the whole stage, and print one line of JSON."""
    from ebr_lib import visualize_embeddings

    place = vectors.parent / f"stage-{rows}"
    before, start = time.process_time(), time.perf_counter()
    config = {"embedding_path": str(many(rows, vectors)), "output_path": str(place / "scatter.png"), "cache": False}
    result = visualize_embeddings(config | {"label_column": "group"})
    found = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - before, "peak_mb": peak_mb()}
    print(json.dumps(found | {"projected": result.numbers["projected"]}))


def _judge_file(rows: int, vectors: Path) -> Path:
    """A file with the 15 nearest neighbours of the first rows, which their maps are compared with."""
    path = vectors.parent / f"near-{vectors.stem}-{rows}.npy"
    if not path.is_file():
        from ebr_lib.visualize import projection

        np.save(path, projection.exact_neighbours(np.load(vectors)[:rows], 15).indices)
    return path


def many(rows: int, vectors: Path, spread: float = 0.5) -> Path:
    """A file of many rows: real vectors repeated with noise of half their length, labels by k-means."""
    path = vectors.parent / f"many-{vectors.stem}-{rows}.npy"
    if not path.is_file():
        from ebr_lib.visualize.clusters import find_clusters

        x, noise = np.load(vectors), np.random.default_rng(SEED)
        codes = find_clusters(x, 60, 0, SEED).codes
        texts = (vectors.with_suffix(".ids.txt")).read_text(encoding="utf-8").split("\n")[1:]
        source = np.arange(rows) % len(x)
        out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, x.shape[1]))
        for start in range(0, rows, 50_000):
            part = x[source[start : start + 50_000]]
            part = part + noise.normal(scale=spread / x.shape[1] ** 0.5, size=part.shape)
            out[start : start + 50_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
        lines = (f"group {codes[i]}\x01{texts[i]}\n" for i in source)
        path.with_suffix(".ids.txt").write_text("group\x01description\n" + "".join(lines), encoding="utf-8")
    return path


class Runs:
    """Runs in a file of JSON lines, which are not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[int, str, int], Run] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            run = json.loads(line)
            self.found[run["rows"], run["name"], run["round"]] = run

    def of(self, rows: int, name: str, rounds: int) -> list[Run]:
        """The first rounds of a contender, in order, without failed ones."""
        found = (self.found.get((rows, name, turn), {}) for turn in range(rounds))
        return [run for run in found if "s" in run]

    def make(self, rows: int, name: str, turn: int, vectors: Path, *, again: bool) -> None:
        if (rows, name, turn) in self.found and not again:
            return
        print(f"{rows:,} rows, round {turn + 1}: {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--one", name, "--sizes", str(rows), "--vectors", str(vectors)]
        run = {"rows": rows, "name": name, "round": turn} | _outcome(command)
        self.found[rows, name, turn] = run
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


def _outcome(command: Sequence[str]) -> Run:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {PATIENCE} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"ended with {done.returncode}")[-500:]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --- tables -------------------------------------------------------------------------------------------------------


def maps_table(rows: int, names: Sequence[str], runs: Runs, rounds: int) -> None:
    print(f"\n### Maps of {rows:,} vectors\n")
    columns = [
        "contender",
        "runs",
        "s",
        "CPU s",
        "× umap-learn",
        "peak MB",
        "t-SNE trust",
        "kept",
        "UMAP trust",
        "kept",
    ]
    print("| " + " | ".join([*columns, "parts"]) + " |\n|" + " --- |" * (len(columns) + 1))
    base = {run["round"]: run for run in runs.of(rows, BASE, rounds)}
    for name in names:
        found = runs.of(rows, name, rounds)
        cells = _cells(found, base) if found else ["0", "failed or not run"]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


def _cells(found: Sequence[Run], base: dict[int, Run]) -> list[str]:
    def mid(key: str, form: str) -> str:
        return format(median(run[key] for run in found), form) if key in found[0] else ""

    ratios = [run["s"] / base[run["round"]]["s"] for run in found if run["round"] in base]
    parts = [f"{part} {median(run['parts'][part] for run in found):.1f}" for part in found[0]["parts"]]
    return [
        str(len(found)),
        mid("s", ".1f"),
        mid("cpu_s", ".1f"),
        f"{median(ratios):.2f}" if ratios else "",
        mid("peak_mb", ".0f"),
        *(mid(f"{kind} {what}", ".3f") for kind in ("tsne", "umap") for what in ("trust", "kept")),
        ", ".join(parts),
    ]


def ours_silhouette(x: Vectors, codes: Codes) -> Callable[[], float]:
    from ebr_lib.visualize.clusters import separation

    return lambda: separation(x, codes).silhouette  # type: ignore[union-attr]


def sklearn_silhouette(x: Vectors, codes: Codes) -> Callable[[], float]:
    from sklearn.metrics import silhouette_score

    doubles = x.astype(np.float64)
    return lambda: float(silhouette_score(doubles, codes, metric="cosine"))


def timed(prepare: Callable[[Vectors, Codes], Callable[[], float]], x: Vectors, codes: Codes) -> Callable[[], Score]:
    """In a contender's process: a turn, which returns seconds and value."""
    score = prepare(x, codes)

    def turn() -> Score:
        start = time.perf_counter()
        value = score()
        return time.perf_counter() - start, value

    return turn


def numbers_table(x: Vectors, rounds: int) -> None:
    """The exact cosine silhouette beside scikit-learn's, on 50 k-means clusters. The first round counts too."""
    from ebr_lib.visualize.clusters import find_clusters

    codes = find_clusters(x, 50, 0, SEED).codes
    contenders = {"ours": ours_silhouette, "scikit-learn": sklearn_silhouette}
    turns = take_turns({name: partial(timed, prepare, x, codes) for name, prepare in contenders.items()}, rounds - 1)
    gain = median(theirs[0] / own[0] for own, theirs in zip(turns["ours"], turns["scikit-learn"], strict=True))
    print(
        f"\n### Cosine silhouette of {len(x):,} vectors in 50 clusters, {rounds} rounds (ours with two more scores)\n"
    )
    print("| | s | value |\n| --- | --- | --- |")
    for name, found in turns.items():
        print(f"| {name} | {median(seconds for seconds, _ in found):.3f} | {found[0][1]:.12f} |")
    print(f"\nfaster by a factor of {gain:.0f}", flush=True)


def stage_table(rows: int, vectors: Path) -> None:
    many(rows, vectors)
    run = _outcome([sys.executable, __file__, "--one", "stage", "--sizes", str(rows), "--vectors", str(vectors)])
    if "failed" in run:
        raise SystemExit(run["failed"])
    print(f"\n### The whole stage on {rows:,} vectors, {run['projected']:,} of them projected\n")
    print("| s | CPU s | peak MB |\n| --- | --- | --- |")
    print(f"| {run['s']:.0f} | {run['cpu_s']:.0f} | {run['peak_mb']:.0f} |", flush=True)


def maps(sizes: Sequence[int], given: argparse.Namespace, vectors: Path) -> None:
    runs = Runs(given.cache / f"runs-{vectors.stem}.jsonl")
    entered = QUICK if given.quick else MAIN if given.main else tuple(CONTENDERS)
    for rows in sizes:
        names = [n for n in entered if any(w in n for w in given.only) and rows <= SLOW.get(n, rows)]
        rounds = given.rounds or ROUNDS.get(rows, 1)
        _judge_file(rows, vectors)
        for turn in range(rounds):
            for name in names:
                runs.make(rows, name, turn, vectors, again=given.again)
        maps_table(rows, names, runs, rounds)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000, 20_000, 100_000])
    parser.add_argument("--rounds", type=int, help="default: 3 at 5,000, else 1")
    parser.add_argument("--only", nargs="+", default=[""], help="contenders with one of these words in their name")
    parser.add_argument("--main", action="store_true", help=", ".join(MAIN))
    parser.add_argument("--quick", action="store_true", help="1,000 vectors, one round, few contenders")
    parser.add_argument("--stage", type=int, metavar="ROWS", help="only the whole stage, on this many rows")
    parser.add_argument("--numbers", action="store_true", help="only the silhouette")
    parser.add_argument("--again", action="store_true", help="repeat runs that are in the cache")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the vectors and runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--vectors", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.one:
        run = run_stage if given.one == "stage" else partial(run_one, given.one)
        return run(given.sizes[0], given.vectors)
    sizes = [1000] if given.quick else given.sizes
    vectors = vectors_file(max(sizes), given.cache)
    if given.stage:
        return stage_table(given.stage, vectors)
    numbers_table(np.load(vectors)[: sizes[0] if given.quick else 20_000], 1 if given.quick else 5)
    if not given.numbers:
        maps(sizes, given, vectors)


if __name__ == "__main__":
    main()
