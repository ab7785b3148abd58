"""What a run returns, and the files that it saves beside the model."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.data.pairs import TrainingRow, texts_of
from ebr_lib.data.text import normalised
from ebr_lib.finetune.doctor import DoctorReport
from ebr_lib.finetune.heldout import GroupMeans
from ebr_lib.finetune.paths import CONFIG_FILE, CURVE_FILE, LOG_FILE
from ebr_lib.finetune.prompts import own_prompts
from ebr_lib.finetune.rows import Rows
from ebr_lib.names import CORPUS_FILE, HELDOUT_FILE, METRICS
from ebr_lib.tables import TableRepr, html_picture, make_table

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class FinetuneResult(TableRepr):
    """What a run wrote and measured.

    `before` and `after` map "all", "seen" and "unseen" (documents that training saw or not) to metric means over the
    held-out anchors; both are empty when nothing was held out. `seconds` is the training alone.
    """

    model_path: str
    merged_path: str | None
    train_rows: int
    heldout_rows: int
    trainable_parameters: int
    steps: int
    seconds: float
    before: GroupMeans
    after: GroupMeans
    doctor: DoctorReport = field(repr=False)
    tables: dict[str, DataFrame] = field(compare=False)

    def __repr__(self) -> str:
        curve = Path(self.model_path) / CURVE_FILE
        return f"{super().__repr__()}\n模型 model: {self.model_path}\n曲线 loss curve: {curve}"

    def _repr_html_(self) -> str:
        model = f"<p>模型 model: <code>{html.escape(self.model_path)}</code></p>"
        return super()._repr_html_() + model + html_picture(Path(self.model_path) / CURVE_FILE, "loss curve")


def before_after(before: GroupMeans, after: GroupMeans) -> DataFrame:
    """Each metric before and after training, by group of anchors."""
    rows = [
        (group, int(before[group]["queries"]), name, was, now, now - was)
        for group in before
        for name in METRICS
        for was, now in [(before[group][name], after[group][name])]
    ]
    if not rows:
        return make_table(
            "微调前后 before and after: 没有验证集 no rows were held out, so nothing was measured", (), ()
        )
    columns = ("documents", "queries", "metric", "before", "after", "change")
    return make_table("微调前后 before and after, on the held-out anchors", columns, rows)


def save_heldout(rows: Rows, folder: Path) -> None:
    """Save the held-out anchors, and every document of the data, for the evaluation stage."""
    answers: dict[str, list[str]] = {}
    for row in rows.heldout:
        answers.setdefault(row.anchor, []).append(row.positive)
    own = own_prompts(rows.heldout)
    lines = (_as_pair(anchor, texts, own.get(anchor)) for anchor, texts in answers.items())
    _write_lines(folder / HELDOUT_FILE, lines)
    # the documents of the held-out measure first, in its order: evaluation then encodes the same batches, to the bit
    measured = rows.task.documents if rows.task else ()
    texts = dict.fromkeys((*measured, *(row.positive for row in (*rows.train, *rows.heldout))))
    seen = texts_of(rows.train)
    _write_lines(folder / CORPUS_FILE, ({"text": text, "seen": normalised(text) in seen} for text in texts))


def save_rows(rows: Sequence[TrainingRow], path: Path) -> None:
    """Save training rows as training data."""
    lines = (_as_pair(row.anchor, row.positive, row.prompt) | {"negative": list(row.negatives)} for row in rows)
    _write_lines(path, lines)


def _as_pair(anchor: str, positive: str | list[str], prompt: str | None) -> dict[str, Any]:
    return {"anchor": anchor, "positive": positive} | ({} if prompt is None else {"prompt": prompt})


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def card_facts(result: FinetuneResult, data_path: str | Sequence[str]) -> dict[str, object]:
    """What the model card says of the training."""
    places = data_path if isinstance(data_path, str) else ", ".join(data_path)
    return {
        "data": f"{places} ({result.train_rows} rows; {result.heldout_rows} held out)",
        "steps": f"{result.steps} in {result.seconds:.0f} s",
        "trainable parameters": f"{result.trainable_parameters:,}",
        "settings": f"`{CONFIG_FILE}`, itself a preset that repeats the run",
        "log": f"`{LOG_FILE}`, `{CURVE_FILE}`",
    }
