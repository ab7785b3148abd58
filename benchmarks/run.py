"""All benchmarks in one go, written to benchmarks/RESULTS.md with machine, versions and date.

    python benchmarks/run.py --data DIR            # 20 minutes on two cores with AMX, 30 without
    python benchmarks/run.py --data DIR --quick    # 3 minutes, few texts: a test that everything runs
    python benchmarks/run.py --data DIR --only training files
    python benchmarks/run.py --data DIR --only projection100k stage quality    # longer ones, run only when named
    python benchmarks/run.py --data DIR --multilingual MODEL                   # Chinese texts as well

DIR has banking77/, cranfield/, cmrc2018/ and online_shopping/. Each part that is run replaces its section and keeps the
others. With a GPU the same parts run on it, and `gpu` is added. The numbers of --quick say nothing about speed: they go
to a separate file in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

from contest import MODELS, machine, start_server

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
QUICK_RESULTS = Path(tempfile.gettempdir()) / "ebr-benchmark-quick.md"
HEAD = "# Measured speed\n\nWritten by `make bench`; every section gives its command, date and machine.\n"


@dataclass(frozen=True)
class Part:
    """A section of the results. In a command, DIR is the folder of the data sets and MODEL the multilingual model."""

    title: str
    command: str
    quick: str  # added to the command by --quick
    always: bool = True  # else only when named
    on_gpu: bool = False

    def missing(self, multilingual: Path | None) -> str:
        """What this part needs and is missing."""
        import torch

        if self.on_gpu and not torch.cuda.is_available():
            return "needs a GPU"
        return "needs --multilingual MODEL" if "MODEL" in self.command and not multilingual else ""


PARTS = {
    "training": Part("Training", "training.py --data DIR --steps 6", "--quick"),
    "shape": Part("Training, 0.5B shape", "training.py --data DIR --parts shape --rounds 2 --steps 8", "--quick"),
    "inference": Part("Encoding", "inference.py --data DIR", "--quick --rounds 1 --sets short"),
    "chinese": Part(
        "Encoding, Chinese",
        "inference.py --data DIR --sets chinese --model MODEL --rounds 3",
        "--quick --rounds 1",
    ),
    "gpu": Part(
        "Encoding, 0.5B shape", "inference.py --data DIR --sets shape --rounds 2", "--quick --rounds 1", on_gpu=True
    ),
    "files": Part("Files", "files.py", "--quick"),
    "memory": Part("Memory of encoding", "files.py --memory", "--quick"),
    "index": Part("Index and search", "index.py", "--quick"),
    "serve": Part("Serving", "serve.py", "--quick", always=False),
    "projection": Part("Maps and numbers", "projection.py --sizes 20000 --main --again", "--quick"),
    "projection5k": Part("Maps of 5,000 vectors", "projection.py --sizes 5000 --again", "--quick", always=False),
    "projection100k": Part(
        "Maps of 100,000 vectors", "projection.py --sizes 100000 --main --again", "--quick", always=False
    ),
    "stage": Part("Drawing a million vectors", "projection.py --stage 1000000", "--quick --stage 3000", always=False),
    "million": Part("Evaluation against a million documents", "index.py --million", "", always=False),
    "quality": Part(
        "Quality",
        "quality.py --data DIR --sets clicks64 clicks256 wrong30 tenth intents shop cranfield",
        "--quick --sets clicks64",
        always=False,
    ),
    "quality_chinese": Part(
        "Quality, Chinese",
        "quality.py --data DIR --sets cmrc --multilingual MODEL",
        "--quick",
        always=False,
    ),
    "retrieval": Part("Retrieval, before and after", "retrieval.py --data DIR", "--quick", always=False),
    "retrieval_chinese": Part(
        "Retrieval, before and after, Chinese",
        "retrieval.py --data DIR --sets cmrc --multilingual MODEL",
        "--quick",
        always=False,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=[name for name, part in PARTS.items() if part.always]
    )
    parser.add_argument("--multilingual", type=Path, help="folder of a model that knows Chinese")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    results = QUICK_RESULTS if args.quick else RESULTS
    start_server(MODELS)  # one for all parts
    where, spent, failed = machine(), dict[str, float](), []
    for name in args.only:
        part = PARTS[name]
        if missing := part.missing(args.multilingual):
            print(f"--- {name}: skipped, {missing}", flush=True)
            continue
        command = f"{part.command} {part.quick}".strip() if args.quick else part.command
        print(f"--- python benchmarks/{command}", flush=True)
        start = time.perf_counter()
        tables = run(command, {"DIR": args.data, "MODEL": args.multilingual})
        spent[name] = time.perf_counter() - start
        if tables is None:
            failed.append(name)
        else:
            print(tables, flush=True)
            keep(results, part.title, f"`python benchmarks/{command}`, {date.today()}. {where}.\n\n{tables}")
    print("--- seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in spent.items()) + f"; {sum(spent.values()):.0f}")
    print(f"--- written to {results}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(command: str, places: dict[str, Path | None]) -> str | None:
    """Output of a benchmark; None if it fails. Its log goes to the terminal."""
    script, *words = (str(places.get(word, word)) for word in command.split())
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            import_module(Path(script).stem).main(words)
    except (Exception, SystemExit):  # the other parts continue
        traceback.print_exc()
        return None
    return printed.getvalue().strip()


def keep(results: Path, title: str, section: str) -> None:
    """Replace a section of the results, or append it."""
    text = results.read_text(encoding="utf-8") if results.exists() else HEAD
    place = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    head, tail = (text[: place.start()], text[place.end() :]) if place else (text, "")
    results.write_text(f"{head.rstrip()}\n\n## {title}\n\n{section}\n\n{tail}".rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
