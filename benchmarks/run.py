"""All benchmarks in one go, written to benchmarks/RESULTS.md with machine, versions and date.

    python benchmarks/run.py --data DIR            # about 20 minutes on two cores
    python benchmarks/run.py --data DIR --quick    # 3 minutes, few texts: to see that all of it runs; writes nothing
    python benchmarks/run.py --data DIR --only training files
    python benchmarks/run.py --data DIR --multilingual MODEL    # Chinese texts as well

DIR holds banking77/, cranfield/ and online_shopping/. A part that was run replaces its section and leaves the others.
On a machine with a GPU the same parts run on it. quality.py takes longer, and stands by itself.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
# part: (title, arguments of a full run, of a quick one); DIR is the folder of the data sets, MODEL a multilingual model
PARTS: dict[str, tuple[str, str, str]] = {
    "training": ("Training", "training.py --data DIR --steps 16", "training.py --data DIR --quick"),
    "shape": (
        "Training, 0.5B shape",
        "training.py --data DIR --parts shape",
        "training.py --data DIR --parts shape --quick",
    ),
    "inference": ("Encoding", "inference.py --data DIR", "inference.py --data DIR --quick --rounds 1"),
    "chinese": (
        "Encoding, Chinese",
        "inference.py --data DIR --sets chinese --model MODEL",
        "inference.py --data DIR --sets chinese --model MODEL --quick --rounds 1",
    ),
    "files": ("Files", "files.py", "files.py --quick"),
    "memory": ("Memory of encoding", "files.py --memory", "files.py --memory --quick"),
    "index": ("Index and search", "index.py", "index.py --rows 5000"),
    "projection": ("Maps and numbers", "projection.py --sizes 5000 20000", "projection.py --quick"),
}
HEAD = "# Measured speed\n\nWritten by `make bench`; every section says its command, date and machine.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--multilingual", type=Path, help="folder of a model that knows Chinese")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    failed = []
    for part in args.only:
        title, full, quick = PARTS[part]
        command = quick if args.quick else full
        if "MODEL" in command and not args.multilingual:
            continue
        print(f"--- python benchmarks/{command}", flush=True)
        start = time.perf_counter()
        tables = run(command, {"DIR": args.data, "MODEL": args.multilingual})
        print(tables if tables is not None else f"{part} failed", f"\n{time.perf_counter() - start:.0f} s", flush=True)
        if tables is None:
            failed.append(part)
        elif not args.quick:
            keep(title, command, tables)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(command: str, places: dict[str, Path | None]) -> str | None:
    """What a benchmark prints to its standard output; None when it fails. Its log goes to the terminal."""
    script, *rest = (str(places.get(word, word)) for word in command.split())
    done = subprocess.run([sys.executable, str(HERE / script), *rest], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def keep(title: str, command: str, tables: str) -> None:
    """Put a section in its place in the results, or at their end."""
    from inference import machine

    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    section = f"## {title}\n\n`python benchmarks/{command}`, {date.today()}. {machine()}.\n\n{tables}\n"
    place = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    head, tail = (text[: place.start()], text[place.end() :]) if place else (text, "")
    RESULTS.write_text(f"{head.rstrip()}\n\n{section}\n{tail}".rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
