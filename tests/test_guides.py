"""Every command of README and docs runs, as it is written there, in a copy of a small shop.

The shop has the folders that the docs name, with a few rows each, and tiny models for all-MiniLM-L6-v2 and KaLM. The
commands of README, from training to a search, run first; each other command starts from what they leave. Not run: those
under a comment that says they need a download, a GPU, a cluster, a server or a log of one's own (`test_docs` parses
them), and `make test`, which runs this. A notebook's cells run in this process, without a kernel.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ebr_lib import cli, notebook
from ebr_lib.finetune import logbook
from ebr_lib.visualize import figure, projection
from tests.test_docs import CHINESE, GUIDES, ROOT, blocks

NEEDS = re.compile("# .*(need|需要|有).*(download|GPU|cluster|server|log of your own|下载|集群|服务|自己的日志)")
TRAIN_ROWS, HELDOUT_ROWS, ITEMS = 12, 6, 20


def marked_commands(block: str) -> Iterator[tuple[str, bool]]:
    """Commands of a block, and whether the comment above says that they need what a test does not have."""
    needs = False
    for line in block.splitlines():
        if line.startswith("#"):
            needs = bool(NEEDS.search(line))
        elif command := shlex.join(shlex.split(line, comments=True)):
            yield command, needs


ALL = [found for guide in GUIDES for block in blocks(guide, "bash") for found in marked_commands(block)]
HERE = {command for command, needs in ALL if not needs and not command.startswith("make ")}
FIRST = [command for command, _ in marked_commands(blocks("README.md", "bash")[-1])]
FIRST.append("python -m ebr_lib infer --output_path ./faiss/embeds_base.txt")
EXAMPLES = [code for page in CHINESE for code in blocks(page, "python") if "import" in code]


def run(command: str) -> int:
    program, *words = shlex.split(command)
    assert program == "python"
    if words[0] == "ebr_finetune.py":
        return cli.main_finetune(words[1:])
    assert words[:2] == ["-m", "ebr_lib"]
    return cli.main(words[2:])


# --- the shop -----------------------------------------------------------------------------------------------------


def some_lines(name: str, folder: Path, count: int, header: int = 0) -> None:
    """Copy a file's first rows, to the same place in another folder."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / name).read_bytes().splitlines(keepends=True)
    (folder / name).write_bytes(b"".join(lines[: count + header]))


def fields(name: str) -> list[list[bytes]]:
    return [line.split(b"\x01") for line in (ROOT / name).read_bytes().splitlines()[: ITEMS + 1]]


def write_click_log(folder: Path) -> None:
    """The sample log of one query in 25."""
    folder.mkdir()
    whole = ROOT / "train_text" / "click_log"
    shutil.copy(whole / "items.jsonl", folder)
    header, *events = gzip.decompress((whole / "events.csv.gz").read_bytes()).splitlines(keepends=True)
    kept = [line for line in events if zlib.crc32(line.rsplit(b",", 5)[0]) % 25 == 0]
    (folder / "events.csv.gz").write_bytes(gzip.compress(b"".join([header, *kept])))


def write_exports(folder: Path) -> None:
    """The catalogue as Hive's own part, alone and in a partition, and as files split by tabs and by commas."""
    day = folder / "by_day" / "dt=2026-11-01"
    day.mkdir(parents=True)
    (folder / "export").mkdir()
    header, *rows = fields("infer_data/catalogue_000.csv")
    chosen = [header.index(name) for name in (b"item_id", b"title", b"description")]
    for name, sign, lines in (("export/000000_0", b"\x01", rows), ("items.tsv", b"\t", [header, *rows])):
        text = b"".join(sign.join(line[i] for i in chosen) + b"\n" for line in lines)
        (folder / name).write_bytes(text)
    shutil.copy(folder / "export" / "000000_0", day)
    with (folder / "items.csv").open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([row[i].decode() for i in chosen] for row in (header, *rows))


def write_judged_queries(folder: Path) -> None:
    """Queries and judgements: for the catalogue by its item ids, and as a BEIR folder."""
    rows = fields("infer_data/catalogue_000.csv")[1:4]
    ids, texts = [row[0].decode() for row in rows], [row[-1].decode() for row in rows]
    asked = {f"q{i}": text.split(".")[0] for i, text in enumerate(texts)}
    queries = [f'{key},"{text}"\n' for key, text in asked.items()]
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\t{id_}\t1\n" for i, id_ in enumerate(ids))
    (folder / "queries.csv").write_text("_id,text\n" + "".join(queries), encoding="utf-8")
    (folder / "qrels.tsv").write_text(qrels, encoding="utf-8")
    beir = folder / "beir" / "scifact"
    (beir / "qrels").mkdir(parents=True)
    (beir / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    for name, known in (("queries", asked), ("corpus", dict(zip(ids, texts, strict=True)))):
        lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in known.items()]
        (beir / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def shop(tiny_bert, tmp_path_factory) -> Path:
    """The shop after the commands of FIRST, in their order."""
    folder = tmp_path_factory.mktemp("guide") / "shop"
    for model in ("all-MiniLM-L6-v2", "model/KaLM-embedding-multilingual-mini-instruct-v2.5"):
        shutil.copytree(tiny_bert, folder / model)
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "EBR_workflow.ipynb", folder)
    some_lines("train_text/queries.jsonl", folder, TRAIN_ROWS)
    some_lines("train_text/heldout/queries.jsonl", folder, HELDOUT_ROWS)
    write_click_log(folder / "train_text" / "click_log")
    for name in ("catalogue_000.csv", "catalogue_001.csv"):
        some_lines(f"infer_data/{name}", folder, ITEMS, header=1)
    write_exports(folder)
    write_judged_queries(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(projection, "umap_map", without_umap)
        assert [command for command in FIRST if run(command)] == []
        assert not run("python -m ebr_lib infer --data_path infer_data/catalogue_001.csv --model_name "
                       "saved_model/all-MiniLM-L6-v2-peft-lora --output_path faiss/new_items.txt")  # fmt: skip
        assert not run("python -m ebr_lib pairs")
    shutil.copytree(folder / "saved_model", folder / "saved_model" / "monday")  # yesterday's model, today's pairs
    for day in ("today", "earlier"):
        shutil.copytree(folder / "train_text", folder / day, ignore=shutil.ignore_patterns("heldout", "click_log"))
    return folder


def without_umap(near: object, start: np.ndarray, **_: object) -> np.ndarray:
    """A map without UMAP, which takes 20 seconds to compile."""
    return start.astype(np.float32)


@pytest.fixture
def in_shop(shop, tmp_path, monkeypatch) -> Path:
    """A test's own copy of the shop, as the current folder. Pictures, half of such a run's time, FIRST has drawn."""
    copy = tmp_path / "shop"
    shutil.copytree(shop, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(logbook, "draw_curve", lambda *given, **named: None)
    monkeypatch.setattr(projection, "umap_map", without_umap)
    monkeypatch.setattr(figure, "draw", lambda path, *given, **named: path.write_bytes(b"picture"))
    return copy


def run_cells(client: notebook._Live) -> None:
    scope = {"display": lambda shown: getattr(shown, "_repr_html_", shown.__repr__)()}
    for cell in client.nb.cells:
        if cell.cell_type == "code":
            exec(cell.source, scope)


# --- what the docs say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(HERE - set(FIRST)))
def test_every_command_runs(command, in_shop, monkeypatch, capsys):
    monkeypatch.setattr(notebook._Live, "execute", run_cells)
    assert run(command) == 0, capsys.readouterr().err


@pytest.mark.parametrize("code", EXAMPLES)
def test_every_python_example_runs(code, in_shop):
    exec(code, {})


def test_make_demo_is_a_command_that_runs_here():
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"python{shown.stdout.strip().splitlines()[-1].partition('/python')[2]}" in HERE


def test_comments_that_say_what_a_command_needs_are_understood():
    block = "a\n# needs a download\nb\n# 有两块 GPU 才有收益\nc\n# then\nd  # why\n"
    assert list(marked_commands(block)) == [("a", False), ("b", True), ("c", True), ("d", False)]
    assert {command for command, needs in ALL if needs} & HERE == set()
    assert set(FIRST) <= HERE
