"""Writing and reading embedding files beside the plain ways, and the memory of a whole run; prints Markdown tables.

    python benchmarks/files.py             # 200,000 vectors of 384 numbers
    python benchmarks/files.py --quick     # 10,000
    python benchmarks/files.py --memory    # peak memory of run_batch_inference, 100,000 and 1,000,000 rows, tiny model

Contenders take turns within a round, so that what disturbs the machine disturbs all of them; a rate is the median over
the rounds, a ratio the median of the rounds' ratios. The plain ways work on a part of the rows: their rate does not
depend on how many there are. Every reading is compared bit for bit with what was written.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout

from ebr_lib.data.vectors import read_embeddings, write_embeddings

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


def write_ours(ending: str) -> Callable[[Path, Vectors], int]:
    def write(folder: Path, vectors: Vectors) -> int:
        write_embeddings(folder / f"ours{ending}", {"id": [str(i) for i in range(len(vectors))]}, vectors)
        return len(vectors)

    return write


def read_ours(ending: str) -> Callable[[Path, Vectors], int]:
    def read(folder: Path, vectors: Vectors) -> int:
        found = read_embeddings(folder / f"ours{ending}").vectors
        assert (found.view(np.uint32) == vectors.view(np.uint32)).all()
        return len(found)

    return read


CONTENDERS: dict[str, Callable[[Path, Vectors], int]] = {
    'write text, " ".join(map(str, row))': write_plain,
    "write text, ours": write_ours(".txt"),
    "write Parquet, ours": write_ours(".parquet"),
    "write npy, ours": write_ours(".npy"),
    "read text, float() a row": read_plain,
    "read text, ours": read_ours(".txt"),
    "read Parquet, ours": read_ours(".parquet"),
    "read npy, ours": read_ours(".npy"),
}
COMPARED = {
    "write text, ours": 'write text, " ".join(map(str, row))',
    "read text, ours": "read text, float() a row",
    "read Parquet, ours": "read text, ours",
}


def measure(rows: int, dim: int, rounds: int) -> None:
    vectors = unit_vectors(rows, dim)
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, work in CONTENDERS.items():
                start = time.perf_counter()
                done = work(Path(folder), vectors)
                rates[name].append(done * dim / (time.perf_counter() - start) / 1e6)
        sizes = {path.suffix: path.stat().st_size for path in Path(folder).glob("ours.*")}
    print(f"\n{rows:,} x {dim}, {rounds} rounds; Mfloat/s is the median\n")
    print("| what | Mfloat/s | ratio | against | runs |\n| --- | ---: | ---: | --- | --- |")
    for name, found in rates.items():
        base = COMPARED.get(name)
        ratio = f"{median(a / b for a, b in zip(found, rates[base], strict=True)):.1f}" if base else ""
        print(f"| {name} | {median(found):.1f} | {ratio} | {base or ''} | {' '.join(f'{x:.1f}' for x in found)} |")
    print("\nMB: " + ", ".join(f"{ending} {size / 1e6:.0f}" for ending, size in sorted(sizes.items())))


# --- memory -------------------------------------------------------------------------------------------------------


def make_catalogue(folder: Path, rows: int) -> None:
    """Every fifth text repeats an earlier one."""
    folder.mkdir()
    with open(folder / "a.csv", "w", encoding="utf-8") as file:
        file.write("id\x01description\n")
        file.writelines(f"{i}\x01item {i - i % 5 if i % 5 == 4 else i} in blue\n" for i in range(rows))


def run_once(model: str, folder: Path, rows: int) -> None:
    """One run in a process of its own; prints rows, seconds and the peak in MB."""
    from ebr_lib import run_batch_inference

    make_catalogue(folder / "in", rows)
    result = run_batch_inference(
        {"model_name": model, "data_path": str(folder / "in"), "output_path": str(folder / "out.txt")}
    )
    assert result.counts["written"] == rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {rows:,} | {result.seconds:.0f} | {peak:.0f} |", flush=True)


def measure_memory(sizes: list[int]) -> None:
    from tests.models import build_tiny

    print("\n| rows | seconds | peak MB |\n| ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny("bert", Path(folder) / "model", hidden=16, layers=1)
        for rows in sizes:
            place = Path(folder) / str(rows)
            place.mkdir()
            command = [sys.executable, __file__, "--one", str(model), str(place), str(rows)]
            subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_once(given.one[0], Path(given.one[1]), int(given.one[2]))
    elif given.memory:
        measure_memory(given.rows or ([10_000, 50_000] if given.quick else [100_000, 1_000_000]))
    else:
        (rows,) = given.rows or [10_000 if given.quick else 200_000]
        measure(rows, 384, 2 if given.quick else 3)


if __name__ == "__main__":
    main()
