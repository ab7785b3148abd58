"""What a run tells its user: how far it is, what it lost, and the summary at its end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.data.hive import EMPTY_LINE
from ebr_lib.errors import DataError
from ebr_lib.inference.hints import likely_knobs, read_rejects
from ebr_lib.inference.inputs import given_columns, hints, most_common
from ebr_lib.inference.job import SKIPPED, Job, Outcome, Tally
from ebr_lib.logs import logger

if TYPE_CHECKING:
    from ebr_lib.model.encoder import EncodeStats

OF_TOKENS = ("truncated", "tokens", "tokens_lost", "tokens_fixed", "tokens_unknown", "slots")
COUNTS = (
    *("read", "written", "rejected", "healed", "empty", "line_breaks", "altered"),
    *("encoded", "duplicates", "uncounted", *OF_TOKENS),
)
KEEP_VALUES = "write Parquet (output_path ….parquet), or leave the column out of output_columns"


class Bar:
    """Shows how far a job is, an interrupted one from where it stopped; counts the texts encoded in this run."""

    def __init__(self) -> None:
        self.texts, self.speed = 0, 0.0
        self._began = time.perf_counter()
        self._bar: Any = None

    def __call__(self, rows: int, texts: int, share: float) -> None:
        """Show rows done, and texts encoded in this run; see `run_job`."""
        from tqdm.auto import tqdm

        self.texts, self.speed = texts, texts / (time.perf_counter() - self._began)
        if self._bar is None:
            self._bar = tqdm(desc="编码 encode", unit="row", unit_scale=True, initial=rows, leave=False)
        self._bar.total = round(rows / share) if share else None
        self._bar.set_postfix_str(f"{self.speed:.0f} texts/s", refresh=False)
        self._bar.update(rows - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def check_losses(job: Job, most: float, outcome: Outcome, rejects: Sequence[Path]) -> None:
    """Check that what a run wrote is good enough to replace the earlier output.

    :param most: share of the rows that may be lost; rows without a text are not losses.
    :param rejects: files of the rows that are not in the output.
    :raises DataError: nothing was written, or too many rows were lost.
    """
    counts, reasons = outcome.new_counts, outcome.new_reasons
    skipped = sum(reasons[reason] for reason in SKIPPED)
    lost, read = counts["rejected"] - skipped, counts["read"] - reasons[EMPTY_LINE]
    if counts["written"] and lost <= most * read:
        return
    if not counts["read"] and job.append and outcome.tally.counts["written"]:
        return  # new files without a row leave the output as it was
    why = most_common(reasons) or "the files hold no rows"
    advice = hints(read_rejects(rejects), job.layout, job.sources)
    where = f"\nThe rejects are in {rejects[0]}" if counts["rejected"] and rejects else ""
    if not counts["written"]:
        raise DataError(f"{job.output}: none of {read} rows was written ({why}); what was there stays{advice}{where}")
    share = math.ceil(1000 * lost / read) / 1000
    raise DataError(
        f"{job.output}: {lost} of {read} rows could not be read ({why}), more than max_rejected_share "
        f"{most:g}; what was there stays{advice}\nOr accept the loss with --max_rejected_share {share:g}: the same "
        f"call then ends at once{where}"
    )


def log_rejects(job: Job, tally: Tally) -> None:
    """Warn of rows that are not in the output, and of values that are not as they were or that others misread."""
    for reason, number in tally.reasons.most_common():
        logger.warning("拒收 %d rows rejected: %s (see %s)", number, reason, job.rejects)
    if tally.reasons:
        for hint in likely_knobs(read_rejects([job.rejects]), job.layout, given_columns(job.sources)):
            logger.warning("建议 hint: %s", hint)
    if tally.altered:
        logger.warning(
            "保留列的 \\001、换行已写成空格，\\N 写成空值 kept values written with a space for \\001 or a newline, "
            "or as null for \\N: %s; %s",
            _by_column(tally.altered),
            KEEP_VALUES,
        )
    if tally.breaks:
        logger.warning(
            "保留列含换行类字符 kept values with a line break such as \\r or U+2028: %s; Spark and pandas may split "
            "such rows: %s",
            _by_column(tally.breaks),
            KEEP_VALUES,
        )


def _by_column(counts: Counter[str]) -> str:
    return ", ".join(f"{column} {number}" for column, number in counts.most_common())


def by_name(counts: Counter[str]) -> dict[str, int | None]:
    """All counts; those of tokens are None for a model that prepares texts its own way."""
    unknown = OF_TOKENS if counts["uncounted"] else ()
    return {name: None if name in unknown else counts[name] for name in COUNTS}


def token_stats(counts: Mapping[str, int]) -> EncodeStats:
    """The counts of tokens, with their shares."""
    from ebr_lib.model.encoder import EncodeStats

    return EncodeStats(**{name: counts[name] for name in OF_TOKENS})


def count_rows(counts: Counter[str], bar: Bar, size: int) -> Iterator[tuple[str, Any]]:
    """The rows of the summary."""
    stats, unknown = token_stats(counts), bool(counts["uncounted"])
    yield "rows read 读入", counts["read"]
    yield "written 写出", counts["written"]
    yield "rejected 拒收", counts["rejected"]
    yield "healed 接回", counts["healed"]
    yield "without text 无文本", counts["empty"]
    if counts["line_breaks"]:
        yield "kept line breaks 含换行类字符", counts["line_breaks"]
    if counts["altered"]:
        yield "kept values altered 保留值已改写", counts["altered"]
    yield "texts encoded 编码文本", counts["encoded"]
    yield "encoded in this run 本次编码", bar.texts
    yield "texts/s 每秒编码", f"{bar.speed:.0f}"
    yield "duplicates 重复", counts["duplicates"]
    yield "truncated 截断", "-" if unknown else counts["truncated"]
    yield "tokens lost 丢失 token", "-" if unknown else f"{stats.lost_share:.2%}"
    yield "unknown tokens 未知 token", "-" if unknown else f"{stats.unknown_share:.1%}"
    yield "padding 填充", f"{stats.padding_share:.1%}" if counts["slots"] else "-"
    yield "MB", f"{size / 1e6:.1f}"
