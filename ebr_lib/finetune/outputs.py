"""What a run returns, and the files that it saves beside the model."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.data.pairs import TrainingRow, texts_of
from ebr_lib.data.text import normalised
from ebr_lib.finetune.doctor import FEW_ROWS, DoctorReport
from ebr_lib.finetune.heldout import GroupMeans
from ebr_lib.finetune.paths import CONFIG_FILE, CURVE_FILE, LOG_FILE
from ebr_lib.finetune.prompts import own_prompts
from ebr_lib.finetune.rows import Rows
from ebr_lib.finetune.strength import metric_to_choose_by
from ebr_lib.names import CORPUS_FILE, HELDOUT_FILE, METRICS, SMALL_DATA_PRESET
from ebr_lib.tables import TableRepr, html_folded, html_picture, html_verdict, make_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pandas import DataFrame

FEW_QUERIES = 50  # fewer are too few to decide by
GROUPS = {"all": "全部 all", "seen": "训练见过的文档 seen", "unseen": "未见的文档 unseen"}
NEARLY_ALL = 0.9
"""A mean metric above which most queries are answered in the first place."""


@dataclass(frozen=True, repr=False)
class FinetuneResult(TableRepr):
    """What a run wrote and measured.

    `before` and `after` map "all", "seen" and "unseen" (documents that training saw or not) to metric means over the
    held-out anchors that nothing was chosen by, and "guard" to those of the guard; both are empty without either.
    `temperature` and `adapter_strength` are those of the saved model. `seconds` is the training alone. `verdict` says
    why the model may not be better than before, and is empty if it is.
    """

    model_path: str
    merged_path: str | None
    train_rows: int
    heldout_rows: int
    trainable_parameters: int
    steps: int
    seconds: float
    temperature: float
    adapter_strength: float
    before: GroupMeans
    after: GroupMeans
    verdict: str
    doctor: DoctorReport = field(repr=False)
    tables: dict[str, DataFrame] = field(compare=False)

    def __repr__(self) -> str:
        curve = Path(self.model_path) / CURVE_FILE
        said = f"\n{self.verdict}" if self.verdict else ""
        return f"{super().__repr__()}{said}\n模型 model: {self.model_path}\n曲线 loss curve: {curve}"

    def _repr_html_(self) -> str:
        place = f"<p>模型 model: <code>{html.escape(self.model_path)}</code></p>"
        curve = html_picture(Path(self.model_path) / CURVE_FILE, "loss curve", height=380)
        folded = html_folded(self.tables.values(), "全部表格 all tables: 前后指标 metrics, 数据检查 data")
        return html_verdict(self.sentence, self.notes) + curve + folded + place

    @property
    def sentence(self) -> str:
        """The metric before and after, in one line."""
        if "all" not in self.before:
            return f"已训练 trained on {self.train_rows} 行 rows; 没有验证集 no rows were held out"
        changes = [
            f"{name} {self.before[group]['ndcg@10']:.3f} → {self.after[group]['ndcg@10']:.3f}"
            for group, name in GROUPS.items()
            if group in self.before
        ]
        return f"{int(self.before['all']['queries'])} 个验证查询 held-out queries: ndcg@10 {'; '.join(changes)}"

    @property
    def notes(self) -> list[str]:
        """What speaks against the model, or against believing its numbers."""
        notes = [self.verdict] if self.verdict else []
        if "all" in self.before and self.before["all"]["queries"] < FEW_QUERIES:
            notes.append(f"验证查询少于 fewer than {FEW_QUERIES} held-out queries: too few to decide by; hold out more")
        was, now = self.before.get("unseen"), self.after.get("unseen")
        if was and now and now["ndcg@10"] < was["ndcg@10"]:
            notes.append(
                "训练未见的文档变差 on documents that training has not seen ndcg@10 fell: the model may have learned "
                "these documents, not the task; train on more different documents, or for fewer epochs"
            )
        return notes


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


def verdict(before: GroupMeans, after: GroupMeans, strength: float, best_metric: str, train_rows: int) -> str:
    """Why the model may be no better than before; empty if it is better, or was not measured."""
    metric = metric_to_choose_by(best_metric)
    if "all" not in before or (strength and after["all"][metric] > before["all"][metric]):
        return ""
    was, now = before["all"][metric], after["all"][metric]
    if was >= NEARLY_ALL:
        why = f"{metric} was {was:.4f} before training, which leaves little to learn"
    elif train_rows < FEW_ROWS:
        why = f"{train_rows} training rows are few (try {SMALL_DATA_PRESET})"
    else:
        why = "the pairs may be noisy, or teach other things than the held-out queries ask; read some of both"
    if not strength:
        return (
            "微调没有帮助，保存的模型与训练前相同 fine-tuning did not help, so the saved model gives the vectors from "
            f"before training (adapter_strength 0): {why}"
        )
    return f"没有超过训练前的模型 no better than before: {metric} {was:.4f} before, {now:.4f} after: {why}"


def save_heldout(rows: Rows, folder: Path, reporting: NDArray[np.bool_] | None = None) -> None:
    """Save the held-out anchors that nothing was chosen by, and every document of the data, for the evaluation stage.

    :param reporting: which queries of the held-out task those are; None is all.
    """
    answers: dict[str, list[str]] = {}
    chosen_by = rows.task.texts_of(~reporting) if rows.task and reporting is not None else ()
    for row in rows.heldout:
        if normalised(row.anchor) not in chosen_by:
            answers.setdefault(row.anchor, []).append(row.positive)
    own = own_prompts(rows.heldout)
    lines = (
        {"anchor": anchor, "positive": texts} | ({"prompt": own[anchor]} if anchor in own else {})
        for anchor, texts in answers.items()
    )
    _write_lines(folder / HELDOUT_FILE, lines)
    # the documents of the held-out measure first, in its order: evaluation then encodes the same batches, to the bit
    measured = rows.task.documents if rows.task else ()
    texts = dict.fromkeys((*measured, *(row.positive for row in (*rows.train, *rows.heldout))))
    seen = texts_of(rows.trained)
    _write_lines(folder / CORPUS_FILE, ({"text": text, "seen": normalised(text) in seen} for text in texts))


def save_rows(rows: Sequence[TrainingRow], path: Path, more: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Save training rows as training data; `more` has further columns of each row."""
    lines = (_as_data(row) | dict(others) for row, others in zip(rows, more or [{}] * len(rows), strict=True))
    _write_lines(path, lines)


def _as_data(row: TrainingRow) -> dict[str, Any]:
    data: dict[str, Any] = {"anchor": row.anchor, "positive": row.positive, "negative": list(row.negatives)}
    if row.prompt is not None:
        data["prompt"] = row.prompt
    if row.weight != 1:
        data["weight"] = row.weight
    if row.scores:
        scores = [score if math.isfinite(score) else None for score in row.scores]
        scores += [None] * (1 + len(row.negatives) - len(scores))
        data |= {"pos_scores": scores[:1], "neg_scores": scores[1:]}
    return data


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def card_facts(
    result: FinetuneResult, data_path: str | Sequence[str], replay_path: str | Sequence[str] | None = None
) -> dict[str, object]:
    """What the model card says of the training."""
    return {
        "data": f"{_places(data_path)} ({result.train_rows} rows; {result.heldout_rows} held out)",
        **({} if replay_path is None else {"replayed in every batch": _places(replay_path)}),
        "steps": f"{result.steps} in {result.seconds:.0f} s",
        "temperature": f"{result.temperature:g}",
        "strength of the adapter": f"{result.adapter_strength:g}",
        "trainable parameters": f"{result.trainable_parameters:,}",
        "settings": f"`{CONFIG_FILE}`, itself a preset that repeats the run",
        "log": f"`{LOG_FILE}`, `{CURVE_FILE}`",
    }


def _places(path: str | Sequence[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)
