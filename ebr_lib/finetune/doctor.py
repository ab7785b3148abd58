"""The data doctor: what is wrong with the training rows, in numbers, before anything is trained."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ebr_lib.data.pairs import TrainingRow
from ebr_lib.data.text import is_blank, language_of
from ebr_lib.errors import DataError
from ebr_lib.model.unfit import unfit_advice
from ebr_lib.names import DEFAULT_PRESET, LANGUAGES, LARGE_BATCH_PRESET, SMALL_DATA_PRESET, STRONG_PRESET
from ebr_lib.tables import as_html, make_table, shortened

if TYPE_CHECKING:
    from pandas import DataFrame

    from ebr_lib.finetune.batches import KnownPositives


FEW_ROWS = 100
SAMPLE, UNKNOWN_SAMPLE = 50_000, 1000
_TOP_DOCUMENTS = _TOP_PROMPTS = 5
_SAMPLED_BATCHES = 100
_MANY_DOCUMENTS, _SMALL_BATCH = 5120, 64  # ten of the large batches, so that few documents repeat in one
PRESET_LINE = "建议预设 recommended preset"

LengthsOf = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class ColumnTokens:
    """Tokens of one column, with special tokens and prompt, before they are cut to `max_seq_length`."""

    column: str
    texts: int
    over: int
    lost_share: float
    mean: float
    p95: int
    longest: int


@dataclass(frozen=True)
class DoctorReport:
    """Numbers of the training rows. Texts are equal if `normalised`; only `exact_duplicates` compares letter by letter.

    "Known" is what the data knows: a document answers an anchor if a row pairs them.
    """

    rows: int
    anchors: int  # different ones
    documents: int  # different positives
    exact_duplicates: int  # rows whose anchor and positive an earlier row has
    duplicates: int  # the same by normalised text, including the exact ones
    positives_as_negatives: int  # hard negatives that are known to answer their anchor
    anchor_is_positive: int
    empty_texts: int
    max_seq_length: int
    sampled: int  # rows of which tokens and languages are counted
    tokens: tuple[ColumnTokens, ...]  # one entry per column
    languages: Mapping[str, float]  # shares of anchors and positives by script: Chinese, English (Latin), mixed, other
    popular: tuple[tuple[str, int], ...]  # the most frequent positives and their number of rows
    batch_size: int
    negatives: int  # documents other than an anchor's own, over all anchors of a batch
    false_negatives: float  # those of a random batch that are known to answer the anchor; expected number
    false_negatives_balanced: float  # the same in batches of `BalancedBatchSampler`, measured
    without_negatives: float  # share of a balanced batch's rows that masking leaves none, so that their loss is 0
    largest_anchor: tuple[str, int]  # the most frequent anchor and its number of rows
    masks: bool  # whether the loss masks known positives; if not, no row is without a negative
    prompts: tuple[tuple[str, int], ...] = ()  # the most frequent that rows bring along, and their number of rows
    unknown_share: float = 0.0  # of the texts' tokens, those that the model's tokenizer does not know; of a sample
    weights: tuple[float, float, float] | None = None  # smallest, mean and largest of a row; None where all are equal
    scored: int = 0  # rows with a teacher's scores
    both_ways: int = 0  # rows whose positive is another row's anchor, and their anchor that row's positive
    on_both_sides: int = 0  # anchors that are positives of other anchors, as in item-to-item data
    bidirectional: bool = False  # whether the loss trains both directions

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do, in Chinese followed by English."""
        unfit = filter(None, [unfit_advice(self.unknown_share)])
        return (*unfit, *_row_advice(self), *_batch_advice(self), *_direction_advice(self))

    @property
    def duplicate_share(self) -> float:
        """`duplicates` as a share of the rows, 0 to 1."""
        return self.duplicates / self.rows

    @property
    def table(self) -> DataFrame:
        """The report for logs and notebooks."""
        return make_table("数据检查 data doctor", ("检查 check", "数量 count", "占比 share"), _table_rows(self))

    @property
    def preset(self) -> tuple[str, str]:
        """The preset that suits these rows, and why, in Chinese and English."""
        if self.rows < FEW_ROWS:
            return SMALL_DATA_PRESET, f"只有 {self.rows} 行 only {self.rows} rows"
        if self.documents >= _MANY_DOCUMENTS and self.batch_size < _SMALL_BATCH:
            return LARGE_BATCH_PRESET, (
                f"不同文档有 {self.documents:,} 个，每批只比较 {self.batch_size} 个 "
                f"a batch compares {self.batch_size} of {self.documents:,} different documents: more are more negatives"
            )
        return DEFAULT_PRESET, (
            f"{self.rows:,} 行、{self.documents:,} 个不同文档，没有需要其他预设的情况 "
            f"{self.rows:,} rows of {self.documents:,} different documents need no other"
        )

    def _repr_html_(self) -> str:
        lines = (*self.advice, f"{PRESET_LINE}: {self.preset[0]} ({self.preset[1]})")
        return as_html(self.table) + "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def examine(
    rows: Sequence[TrainingRow],
    lengths_of: LengthsOf,
    *,
    max_seq_length: int,
    batch_size: int,
    prompts: Mapping[str, str] | None = None,
    unknown_of: Callable[[Sequence[str]], float] = lambda texts: 0.0,
    masks: bool = True,
    bidirectional: bool = False,
    seed: int = 0,
) -> DoctorReport:
    """Examine the training rows.

    Everything is counted over all rows, except tokens and languages: with more than 50,000 rows these are counted over
    a random sample.

    :param lengths_of: texts to their lengths in tokens, not truncated.
    :param batch_size: rows whose documents are each other's negatives.
    :param prompts: the prompt of each column (anchor, positive, negative).
    :param unknown_of: texts to the share of their tokens that the model does not know, 0 to 1.
    :param masks: whether the loss masks known positives.
    :param bidirectional: whether the loss trains both directions.
    :raises DataError: there are no rows.
    """
    from ebr_lib.finetune.batches import KnownPositives

    if not rows:
        raise DataError("the data doctor got no training rows")
    known = KnownPositives(rows)
    pairs = known.anchors * (known.documents.max() + 1) + known.documents
    own, differ = known.own_answers(), known.anchors != known.documents
    batch_size = min(batch_size, len(rows))
    masked, without_negatives = _balanced_masking(known, batch_size, seed)
    sample = rows
    if len(rows) > SAMPLE:
        chosen = np.random.default_rng(seed).choice(len(rows), SAMPLE, replace=False)
        sample = [rows[i] for i in np.sort(chosen)]
    languages = [language_of(text) for row in sample for text in (row.anchor, row.positive)]
    return DoctorReport(
        rows=len(rows),
        anchors=len(np.unique(known.anchors)),
        documents=len(np.unique(known.documents)),
        exact_duplicates=len(rows) - len({(row.anchor, row.positive) for row in rows}),
        duplicates=len(rows) - len(np.unique(pairs)),
        positives_as_negatives=int(own[:, 1:].sum()),
        anchor_is_positive=int((known.anchors == known.documents).sum()),
        empty_texts=sum(is_blank(text) for row in rows for text in (row.anchor, row.positive, *row.negatives)),
        max_seq_length=max_seq_length,
        sampled=len(sample),
        tokens=_tokens(sample, lengths_of, max_seq_length, prompts or {}),
        languages={language: languages.count(language) / len(languages) for language in LANGUAGES},
        unknown_share=unknown_of(
            [t for r in sample[:: -(-len(sample) // UNKNOWN_SAMPLE)] for t in (r.anchor, r.positive)]
        ),
        popular=_most_frequent([row.positive for row in rows], known.documents, _TOP_DOCUMENTS),
        batch_size=batch_size,
        negatives=batch_size * (batch_size * known.columns.shape[1] - 1),
        false_negatives=_expected_false_negatives(known, own, batch_size),
        false_negatives_balanced=masked,
        without_negatives=without_negatives if masks else 0.0,
        masks=masks,
        prompts=tuple(Counter(row.prompt for row in rows if row.prompt is not None).most_common(_TOP_PROMPTS)),
        weights=_weights(rows),
        both_ways=_both_ways(known),
        on_both_sides=len(np.intersect1d(known.anchors[differ], known.documents[differ])),
        bidirectional=bidirectional,
        scored=sum(len(row.scores) > 1 for row in rows),
        largest_anchor=_most_frequent([row.anchor for row in rows], known.anchors, 1)[0],
    )


# --- counting -----------------------------------------------------------------------------------------------------


def _expected_false_negatives(known: KnownPositives, own: NDArray[np.bool_], batch_size: int) -> float:
    """Mean number of known positives among the negatives of a random batch; exact.

    Two given rows meet with probability b(b − 1) / (N(N − 1)), and a row is in the batch with b / N.
    """
    rows = len(known.anchors)
    within_row = int(own.sum())
    across_rows = known.answers_among(known.anchors, known.columns.ravel()) - within_row
    meet = batch_size * (batch_size - 1) / (rows * (rows - 1)) if rows > 1 else 0.0
    return meet * across_rows + batch_size / rows * (within_row - rows)


def _balanced_masking(known: KnownPositives, batch_size: int, seed: int) -> tuple[float, float]:
    """The same in the first full batches of a balanced epoch, which are in random order, and the share of their rows
    without a negative."""
    import torch

    from ebr_lib.finetune.batches import BalancedBatchSampler

    sampler = BalancedBatchSampler(known.documents, known.anchors, batch_size=batch_size, drop_last=True, seed=seed)
    masks = [known.mask(torch.tensor(batch)) for batch in islice(sampler, _SAMPLED_BATCHES)]
    found = np.mean([int(mask.sum()) - batch_size for mask in masks])
    return float(found), float(np.mean([mask.all(dim=1).float().mean() for mask in masks]))


def _weights(rows: Sequence[TrainingRow]) -> tuple[float, float, float] | None:
    weights = np.array([row.weight for row in rows])
    least, most = float(weights.min()), float(weights.max())
    return None if least == most else (least, float(weights.mean()), most)


def _both_ways(known: KnownPositives) -> int:
    """Rows whose pair another row has the other way round."""
    base = max(known.anchors.max(), known.documents.max()) + 1
    pairs, turned = known.anchors * base + known.documents, known.documents * base + known.anchors
    return int((np.isin(pairs, turned) & (known.anchors != known.documents)).sum())


def _tokens(
    rows: Sequence[TrainingRow], lengths_of: LengthsOf, limit: int, prompts: Mapping[str, str]
) -> tuple[ColumnTokens, ...]:
    columns = {
        "anchor": [(prompts.get("anchor", "") if row.prompt is None else row.prompt) + row.anchor for row in rows],
        "positive": [prompts.get("positive", "") + row.positive for row in rows],
        "negative": [prompts.get("negative", "") + text for row in rows for text in row.negatives],
    }
    return tuple(_column_tokens(column, texts, lengths_of, limit) for column, texts in columns.items() if texts)


def _column_tokens(column: str, texts: Sequence[str], lengths_of: LengthsOf, limit: int) -> ColumnTokens:
    from tqdm.auto import tqdm

    different, place = np.unique(np.array(texts, dtype=object), return_inverse=True)
    starts = tqdm(range(0, len(different), 1000), desc="data doctor: tokens", disable=len(different) < 10_000)
    lengths = np.concatenate([lengths_of(different[start : start + 1000].tolist()) for start in starts])[place]
    lost = np.maximum(lengths - limit, 0)
    return ColumnTokens(
        column=column,
        texts=len(lengths),
        over=int((lost > 0).sum()),
        lost_share=float(lost.sum() / max(1, lengths.sum())),
        mean=float(lengths.mean()),
        p95=int(np.percentile(lengths, 95, method="higher")),
        longest=int(lengths.max()),
    )


def _most_frequent(texts: Sequence[str], numbers: NDArray[np.int64], count: int) -> tuple[tuple[str, int], ...]:
    """The texts of the most frequent numbers, with their counts."""
    _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    top = np.argsort(-counts, kind="stable")[:count]
    return tuple((texts[int(first[i])], int(counts[i])) for i in top)


# --- showing ------------------------------------------------------------------------------------------------------


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""


def _count(name: str, count: int, whole: int) -> tuple[str, str, str]:
    return name, f"{count:,}", _percent(count, whole)


def _table_rows(report: DoctorReport) -> list[tuple[str, str, str]]:
    counts = [
        ("行数 rows", report.rows),
        ("不同的 anchor unique anchors", report.anchors),
        ("不同的 positive unique positives", report.documents),
        ("完全重复 exact duplicates", report.exact_duplicates),
        ("归一化后重复 normalised duplicates", report.duplicates),
        ("正样本又作负样本 positives as negatives", report.positives_as_negatives),
        ("anchor 与 positive 相同 anchor = positive", report.anchor_is_positive),
        ("空文本 empty texts", report.empty_texts),
    ]
    table = [_count(name, count, report.rows) for name, count in counts]
    for column in report.tokens:
        tokens = f"over {report.max_seq_length} tokens (mean {column.mean:.0f}, longest {column.longest})"
        lost = f", 丢失 lost {_percent(column.lost_share, 1)}" if column.over else ""
        name, over, share = _count(f"{column.column} 超过 {tokens}", column.over, column.texts)
        table.append((name, over, share + lost))
    table += [(f"语言 language: {name}", "", _percent(share, 1)) for name, share in report.languages.items() if share]
    table.append(("未知 token unknown tokens", "", f"{report.unknown_share:.1%}"))
    if report.sampled < report.rows:
        table.append(("以上 token 与语言为抽样 tokens and languages: a sample", f"{report.sampled:,}", ""))
    if report.both_ways:
        table.append(_count("双向样本 pairs both ways", report.both_ways, report.rows))
    if report.weights:
        table.append(("样本权重 weights: min, mean, max", " … ".join(f"{weight:.3g}" for weight in report.weights), ""))
    if report.scored:
        table.append(_count("有教师分数 with a teacher's scores", report.scored, report.rows))
    for kind, texts in (("自带提示词 own prompt", report.prompts), ("热门文档 popular", report.popular)):
        table += [_count(f"{kind}: {shortened(text)}", count, report.rows) for text, count in texts]
    for batch, value in (("random", report.false_negatives), ("balanced", report.false_negatives_balanced)):
        name = f"每批假负例 false negatives, {batch} batch of {report.batch_size}"
        table.append((name, f"{value:,.1f}", _percent(value, report.negatives)))
    if report.without_negatives:
        name = f"没有负例的行 rows without a negative, balanced batch of {report.batch_size}"
        table.append((name, "", _percent(report.without_negatives, 1)))
    return table


# --- advice -------------------------------------------------------------------------------------------------------


def _row_advice(report: DoctorReport) -> Iterator[str]:
    """What is wrong with the rows themselves."""
    if report.rows < FEW_ROWS:
        yield (
            f"训练数据过少：只有 {report.rows} 条（少于 {FEW_ROWS} 条），模型容易过拟合。"
            f"请补充数据，或使用更强的正则化：{STRONG_PRESET}，或专为小数据准备的 {SMALL_DATA_PRESET}。 "
            f"Only {report.rows} training rows (under {FEW_ROWS}): the model will memorise them; add data, or use "
            f"the stronger regularisation of {STRONG_PRESET}, or {SMALL_DATA_PRESET}, which is made for few rows."
        )
    if report.duplicate_share >= 0.01:
        yield (
            f"{report.duplicates:,} 行重复（{report.duplicate_share:.1%}），请去重。 "
            f"{report.duplicates:,} rows repeat the anchor and positive of another ({report.duplicate_share:.1%}): "
            "remove them, or the model trains on them more than on others."
        )
    if report.positives_as_negatives:
        yield (
            f"{report.positives_as_negatives:,} 个负样本同时是该 anchor 的正样本；"
            "mask_known_positives 会屏蔽它们，但最好修正数据。 "
            f"{report.positives_as_negatives:,} negatives are known positives of their anchor: mask_known_positives "
            "leaves them out of the loss, but correct the data."
        )
    if report.anchor_is_positive:
        yield (
            f"{report.anchor_is_positive:,} 行的 anchor 与 positive 相同，不提供信息，请删除。 "
            f"{report.anchor_is_positive:,} rows have the same text as anchor and as positive: they teach nothing; "
            "remove them."
        )
    if report.empty_texts:
        yield f"{report.empty_texts:,} 个文本为空，请删除。 {report.empty_texts:,} texts are empty: remove them."
    if cut := [column for column in report.tokens if column.over > 0.05 * column.texts]:
        names = ", ".join(f"{column.column} {_percent(column.over, column.texts)}" for column in cut)
        enough = max(column.p95 for column in cut)
        yield (
            f"文本被截断（{names}）：max_seq_length 为 {enough} 才能完整容纳 95% 的文本；"
            "模型不支持时，请把要点放在前面。 "
            f"Texts are cut ({names}): max_seq_length {enough} would hold 95% of them, if the model takes that many; "
            "otherwise put what matters first."
        )


def _batch_advice(report: DoctorReport) -> Iterator[str]:
    """What the rows make of a batch."""
    if masked := _masked_away(report):
        yield masked
        return
    if report.false_negatives > 0.005 * report.negatives:
        random = _percent(report.false_negatives, report.negatives)
        balanced = _percent(report.false_negatives_balanced, report.negatives)
        # where a few documents have most rows, no order keeps them apart
        balancing = "balanced_batches, " if report.false_negatives_balanced < report.false_negatives / 2 else ""
        knobs = f"{balancing}mask_known_positives"
        yield (
            f"文档重复出现：随机批次中 {random} 的负例其实是正例，均衡批次中为 {balanced}。"
            f"请保持 {knobs} 开启（默认）。 "
            f"Documents repeat: {random} of a random batch's negatives are known positives, {balanced} of a balanced "
            f"one's. Keep on, as is the default: {knobs}."
        )
    if report.documents < report.batch_size:
        yield (
            f"不同文档只有 {report.documents} 个，少于批大小 {report.batch_size}：更大的批不会带来更多负例。 "
            f"There are {report.documents} different documents, fewer than the batch of {report.batch_size}: a batch "
            f"over {report.documents} adds no new negatives; hard negatives or a smaller batch may."
        )


def _masked_away(report: DoctorReport) -> str | None:
    """Which text is the cause when masking leaves little to learn from."""
    mostly = report.masks and report.false_negatives_balanced > 0.8 * report.negatives
    if report.without_negatives < 0.1 and not mostly:
        return None
    (document, of_document), (anchor, of_anchor) = report.popular[0], report.largest_anchor
    if 2 * max(of_anchor, of_document) < report.rows:
        cause = f"{report.anchors} 个 anchor 与 {report.documents} 个文档几乎两两匹配"
        english = f"the {report.anchors} anchors and {report.documents} documents nearly all answer each other"
    elif of_anchor > of_document:
        cause = f"anchor“{shortened(anchor)}”占 {_percent(of_anchor, report.rows)} 的行"
        english = f"the anchor {shortened(anchor)!r} has {_percent(of_anchor, report.rows)} of the rows"
    else:
        cause = f"文档“{shortened(document)}”是 {_percent(of_document, report.rows)} 的行的正例"
        english = (
            f"the document {shortened(document)!r} is the positive of {_percent(of_document, report.rows)} of the rows"
        )
    masked = _percent(report.false_negatives_balanced, report.negatives)
    nothing = _percent(report.without_negatives, 1)
    return (
        f"批内 {masked} 的负例是已知正例、会被屏蔽，{nothing} 的行没有负例、损失为 0，学不到东西：{cause}。"
        "请补充其他 anchor 与文档的样本，减少它的行数，或给出 negative；与学习率无关。 "
        f"{masked} of a batch's negatives are known positives and get masked, and {nothing} of the rows have no "
        f"negative left, so their loss is 0: {english}. Add rows of other anchors and documents, keep fewer of "
        "its rows, or give negatives; the learning rate is not the cause."
    )


def _direction_advice(report: DoctorReport) -> Iterator[str]:
    if not report.bidirectional and report.on_both_sides >= 0.1 * report.anchors:
        yield (
            f"{report.on_both_sides:,} 个 anchor 同时是别的 anchor 的正例（{report.both_ways:,} 行双向成对），"
            "像是商品到商品的数据：可试 bidirectional_loss: true，并让两侧使用相同的提示词。 "
            f"{report.on_both_sides:,} anchors are positives of other anchors ({report.both_ways:,} rows go both "
            "ways): this looks like item-to-item data; try bidirectional_loss: true, with one prompt for both sides."
        )
