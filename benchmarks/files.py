"""Speed of writing and reading embedding files beside plain Python, and memory of a whole run, as Markdown tables.

    python benchmarks/files.py             # 200,000 vectors of 384 numbers
    python benchmarks/files.py --quick     # 5,000
    python benchmarks/files.py --memory    # peak memory of encoding 100,000 and 1,000,000 rows with a tiny model

Each contender has its own process; they take turns in each round. A rate is the median over the rounds, a ratio the
median of the rounds' ratios. Plain Python gets only some of the rows, since its rate does not depend on their number.
Everything that is read is compared bit for bit with the original.

Memory is measured for `run_batch_inference` and for a typical script: read the texts, encode the list, write the lines.
Each run has its own process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from contest import MODELS, alone, peak_mb, take_turns
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout

from ebr_lib.data.embeddings.files import read_embeddings, write_embeddings

Vectors = NDArray[np.float32]
PLAIN_ROWS = 4000


def unit_vectors(rows: int, dim: int) -> Vectors:
    vectors = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_plain(folder: Path, vectors: Vectors) -> int:
    with open(folder / "plain.txt", "w", encoding="utf-8") as file:
        file.write("id\x01vector\n")
        for i, vector in enumerate(vectors[:PLAIN_ROWS]):
            file.write(f"{i}\x01{' '.join(map(str, vector))}\n")
    return min(PLAIN_ROWS, len(vectors))


def read_plain(folder: Path, vectors: Vectors) -> int:
    with open(folder / "plain.txt", encoding="utf-8") as file:
        next(file)
        found = np.array([[float(x) for x in line.split("\x01")[1].split(" ")] for line in file], dtype=np.float32)
    assert (found.view(np.uint32) == vectors[: len(found)].view(np.uint32)).all()
    return len(found)


def write_ours(ending: str, folder: Path, vectors: Vectors) -> int:
    write_embeddings(folder / f"ours{ending}", {"id": [str(i) for i in range(len(vectors))]}, vectors)
    return len(vectors)


def read_ours(ending: str, folder: Path, vectors: Vectors) -> int:
    found = read_embeddings(folder / f"ours{ending}").vectors
    assert (found.view(np.uint32) == vectors.view(np.uint32)).all()
    return len(found)


CONTENDERS: dict[str, Callable[[Path, Vectors], int]] = {
    'write text, " ".join(map(str, row))': write_plain,
    "write text, ours": partial(write_ours, ".txt"),
    "write Parquet, ours": partial(write_ours, ".parquet"),
    "write npy, ours": partial(write_ours, ".npy"),
    "read text, float() per row": read_plain,
    "read text, ours": partial(read_ours, ".txt"),
    "read Parquet, ours": partial(read_ours, ".parquet"),
    "read npy, ours": partial(read_ours, ".npy"),
}
COMPARED = {
    "write text, ours": 'write text, " ".join(map(str, row))',
    "read text, ours": "read text, float() per row",
    "read Parquet, ours": "read text, ours",
}


def prepare(name: str, folder: Path) -> Callable[[], float]:
    """In the contender's process: a turn, which returns million numbers per second."""
    vectors = np.load(folder / "vectors.npy")

    def turn() -> float:
        start = time.perf_counter()
        done = CONTENDERS[name](folder, vectors)
        return done * vectors.shape[1] / (time.perf_counter() - start) / 1e6

    return turn


def measure(rows: int, dim: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        np.save(folder / "vectors.npy", unit_vectors(rows, dim))
        turns = take_turns({name: partial(prepare, name, folder) for name in CONTENDERS}, rounds)
        sizes = {path.suffix: path.stat().st_size for path in folder.glob("ours.*")}
    rates = {name: found[1:] for name, found in turns.items()}
    print(f"\n{rows:,} × {dim}, {rounds} rounds; Mfloat/s is the median\n")
    print("| what | Mfloat/s | ratio | against | runs |\n| --- | ---: | ---: | --- | --- |")
    for name, found in rates.items():
        base = COMPARED.get(name)
        ratio = f"{median(a / b for a, b in zip(found, rates[base], strict=True)):.1f}" if base else ""
        print(f"| {name} | {median(found):.1f} | {ratio} | {base or ''} | {' '.join(f'{x:.1f}' for x in found)} |")
    print("\nMB: " + ", ".join(f"{ending} {size / 1e6:.0f}" for ending, size in sorted(sizes.items())))


# --- memory -------------------------------------------------------------------------------------------------------


def make_catalogue(folder: Path, rows: int) -> None:
    """Every fifth text repeats an earlier one."""
    folder.mkdir(parents=True)
    with open(folder / "a.csv", "w", encoding="utf-8") as file:
        file.write("id\x01description\n")
        file.writelines(f"{i}\x01item {i - i % 5 if i % 5 == 4 else i} in blue\n" for i in range(rows))


def encode_ours(model: str, source: Path, output: Path) -> None:
    from ebr_lib import run_batch_inference

    run_batch_inference({"model_name": model, "data_path": str(source), "output_path": str(output)})


def encode_plain(model: str, source: Path, output: Path) -> None:
    """A typical script."""
    import pandas as pd
    from sentence_transformers import SentenceTransformer

    rows = pd.read_csv(source / "a.csv", sep="\x01")
    vectors = SentenceTransformer(model, device="cpu").encode(rows["description"].tolist(), batch_size=256)
    rows["vector"] = [" ".join(map(str, vector)) for vector in vectors]
    rows.to_csv(output, sep="\x01", index=False)


SCRIPTS = {"ours": encode_ours, "encode the whole list, write": encode_plain}


def run_once(name: str, model: str, source: Path) -> tuple[float, float]:
    """Seconds of one run, and peak memory of its process in MB."""
    start = time.perf_counter()
    SCRIPTS[name](model, source, source.parent / "out.txt")
    return time.perf_counter() - start, peak_mb()


def measure_memory(sizes: Sequence[int]) -> None:
    from tests.models import build_tiny

    print("\n| script | rows | s | peak MB | × fewest rows |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny("bert", Path(folder) / "model", hidden=16, layers=1)
        for name in SCRIPTS:
            peaks = []
            for rows in sizes:
                source = Path(folder) / f"{rows}" / "in"
                make_catalogue(source, rows)
                seconds, peak = alone(partial(run_once, name, str(model), source), MODELS)
                assert (source.parent / "out.txt").read_bytes().count(b"\n") == rows + 1
                shutil.rmtree(source.parent)
                peaks.append(peak)
                ratio = peak / peaks[0]
                print(f"| {name} | {rows:,} | {seconds:.0f} | {peak:.0f} | {ratio:.2f} |", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5,000 rows; with --memory 2,000 and 20,000")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", help="other sizes")
    given = parser.parse_args(words)
    if given.memory:
        measure_memory(given.rows or ([2000, 20_000] if given.quick else [100_000, 1_000_000]))
    else:
        (rows,) = given.rows or [5000 if given.quick else 200_000]
        measure(rows, 384, 1 if given.quick else 3)


if __name__ == "__main__":
    main()
