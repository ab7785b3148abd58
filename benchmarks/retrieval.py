"""Does retrieval get better? Base model, fine-tuned model and BM25 on real searches; prints Markdown tables.

    python benchmarks/retrieval.py --data DIR                                     # Cranfield, banking77
    python benchmarks/retrieval.py --data DIR --sets cmrc --multilingual MODEL    # Chinese
    python benchmarks/retrieval.py --data DIR --keep FOLDER                       # the reports stay there

The sets and their splits are those of quality.py, and no test query is trained on or chosen by. Fine-tuning and
evaluation are the stages as a user calls them: one model trained with the defaults except the set's batch and length,
with the set's pairs to choose by held out, then measured on the test queries with a 95 % bootstrap interval and a
paired permutation test (Holm) for each difference to the base.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # so that it runs from a checkout

from quality import SETS, Set  # noqa: E402

if TYPE_CHECKING:
    from ebr_lib.evaluate.run import EvalResult

MEASURES = ("ndcg@10", "recall@10", "recall@100", "mrr@10")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=["cranfield", "intents", "cmrc"], default=["cranfield", "intents"])
    parser.add_argument("--multilingual", help="model of the Chinese set")
    parser.add_argument("--keep", type=Path, help="folder for models and reports; else they are thrown away")
    parser.add_argument("--quick", action="store_true", help="few pairs and queries: to see that it runs")
    args = parser.parse_args(words)
    for name in args.sets:
        model = args.multilingual if name == "cmrc" else "all-MiniLM-L6-v2"
        task = SETS[name](args.data)
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.keep / name if args.keep else Path(scratch)
            print(markdown(name, task, measured(task, model, folder, args.quick)), flush=True)


def measured(task: Set, model: str, folder: Path, quick: bool) -> EvalResult:
    """Fine-tune on the set's pairs, and evaluate on its test queries."""
    from ebr_lib import evaluate_retrieval, train_sentence_transformer

    folder.mkdir(parents=True, exist_ok=True)
    task = task.shortened() if quick else task
    train, heldout = (
        write_lines(folder / f"{name}.jsonl", [{"anchor": anchor, "positive": text} for anchor, text in pairs])
        for name, pairs in (("train", task.pairs), ("heldout", task.choosing))
    )
    search = task.search
    asked = zip(search.queries, search.answers, strict=True)
    answers = [{"query": query, "positive": [search.documents[i] for i in found]} for query, found in asked]
    knobs = {
        "model_name": model,
        "data_path": train,
        "eval_data_path": heldout,
        "output_dir": str(folder),
        "bf16": True,
    }
    trained = train_sentence_transformer(knobs | dict(task.knobs))
    return evaluate_retrieval(
        {
            "models": [model, trained.model_path],
            "data_path": write_lines(folder / "queries.jsonl", answers),
            "corpus_path": write_lines(folder / "corpus.jsonl", [{"text": text} for text in search.documents]),
            "train_data_path": train,
            "max_seq_length": task.knobs.get("max_seq_length"),
            "output_dir": str(folder / "evaluation"),
        }
    )


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def markdown(name: str, task: Set, result: EvalResult) -> str:
    base, *others = result.metrics
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.facts.items())
    lines = [f"\n{name}: {len(task.pairs)} training pairs; {facts}\n"]
    lines += ["| contender | " + " | ".join(MEASURES) + " |", "| --- |" + " ---: |" * len(MEASURES)]
    lines.append(f"| {base} | " + " | ".join(f"{result.metrics[base][measure]:.4f}" for measure in MEASURES) + " |")
    found = {(d.contender, d.metric): d for d in result.differences if d.baseline == base}
    for other in others:
        cells = []
        for measure in MEASURES:
            d = found[other, measure]
            star = "*" if d.p_holm < 0.05 else ""
            gain = f"{d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}]{star}"
            cells.append(f"{result.metrics[other][measure]:.4f} ({gain})")
        lines.append(f"| {other} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "\n\\* p < .05 after Holm"])


if __name__ == "__main__":
    main()
