"""Extension stage: make training pairs and held-out queries out of a click log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import polars as pl
from pandas import DataFrame

from ebr_lib.errors import DataError
from ebr_lib.files import check_apart, check_replaceable, make_folder, sha256_of, write_json, written_whole
from ebr_lib.logs import RESULT, logger
from ebr_lib.names import CORPUS_FILE
from ebr_lib.pairs import choose, outputs
from ebr_lib.pairs.bias import Bias, position_bias
from ebr_lib.pairs.catalogue import Catalogue, open_catalogue
from ebr_lib.pairs.columns import ANCHOR, CLICKS, ITEM, ITEMS_SEEN, KEY, QUERY, QUERY_SEEN, TEXT
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.counts import BOT, ID_QUERY, Counted, count_rows, rejected_rows
from ebr_lib.pairs.funnel import HELDOUT, ROWS, TRAIN, Funnel
from ebr_lib.pairs.report import report_page, report_tables
from ebr_lib.pairs.rows import (
    BAD_TIME,
    CLOCKS,
    DATE,
    EPOCH,
    FAR_TIME,
    UNKNOWN_EVENT,
    ZONED,
    Columns,
    find_columns,
    unknown_events,
)  # fmt: skip
from ebr_lib.pairs.sources import Table, open_table
from ebr_lib.pairs.sql import aggregation_sql
from ebr_lib.tables import TableRepr, as_text, html_folded, html_link, html_verdict

DUPLICATE, NO_TEXT = "equal to another row", "item without text in the catalogue"
SHOWN_DAYS = 5


@dataclass(frozen=True, repr=False)
class PairsResult(TableRepr):
    """What was made. `tables` has `funnel`, `positions`, `languages`, `popular`, `examples`.

    :ivar pairs: training pairs for `data_path` of fine-tuning.
    :ivar heldout: BEIR folder for `data_path` of the evaluation; None without held-out days.
    :ivar finetune_preset: preset of fine-tuning on exactly these files; `evaluate_preset` is of the evaluation.
    :ivar counts: pairs, queries and items of training, held-out queries and pairs, rejects.
    """

    folder: Path
    pairs: Path
    heldout: Path | None
    rejects: Path
    report_html: Path
    manifest: Path
    finetune_preset: Path
    evaluate_preset: Path | None
    counts: dict[str, int]
    tables: dict[str, DataFrame] = field(compare=False)

    def _repr_html_(self) -> str:
        said = self.tables["funnel"].attrs["title"]
        return (
            html_verdict(said)
            + html_folded(self.tables.values(), "各步去掉多少 all tables")
            + html_link(self.report_html)
        )


@dataclass(frozen=True)
class SqlResult:
    """The query that was written in place of a run."""

    sql: Path

    def __str__(self) -> str:
        return self.sql.read_text(encoding="utf-8")


@dataclass(frozen=True)
class _Work:
    """What the steps on pairs share."""

    config: PairsConfig
    counted: Counted
    catalogue: Catalogue
    bias: Bias
    funnel: Funnel


def make_training_pairs(config: PairsConfig | Mapping[str, Any] | None = None) -> PairsResult | SqlResult:
    """Make `pairs.jsonl`, a held-out folder, rejects, report, manifest and presets out of a click log.

    :param config: a PairsConfig, a dict of its knobs, or None for the defaults.
    :returns: with `sql_table` the query alone, as SqlResult.
    :raises ConfigError: a knob is unknown or out of range (all are listed), or `output_dir` holds other files.
    :raises DataError: a column is missing, too many rows are unusable, too many items have no text, nothing is left.
    :raises MissingError: the log or the catalogue is not there.
    """
    config = PairsConfig.resolve(config)
    folder = Path(config.output_dir)
    if config.sql_table:
        return _write_sql(config, config.sql_table, folder)
    check_replaceable(folder, outputs.is_own)
    check_apart([folder], [config.log_path, config.catalogue_path, config.presets])
    make_folder(folder.parent)
    with written_whole(folder) as new, _polars_errors(config):
        spill = new / "spill"
        spill.mkdir(parents=True)
        return _make(config, new, folder, spill)


@contextmanager
def _polars_errors(config: PairsConfig) -> Iterator[None]:
    """Turn an error of polars into a sentence."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().split("\n", 1)[0]
        if "format string" in reason:
            raise DataError(f"time_format {config.time_format}: {reason}") from error
        raise DataError(
            f"log_path {config.log_path} or catalogue_path {config.catalogue_path} cannot be read: {reason}; a row has "
            "more fields than its header, a quote is not closed, or the JSON is broken"
        ) from error


def _write_sql(config: PairsConfig, table: str, folder: Path) -> SqlResult:
    """Write the query for a table whose columns are as the knobs name them, or the first of the usual names."""
    columns = Columns(
        query=config.query_column or "query",
        item=config.item_column or "item_id",
        event=config.event_column or "event",
        time=config.time_column or "time",
        position=config.position_column,
        session=config.session_column,
        counts={},
    )
    place = make_folder(folder) / outputs.SQL_FILE
    with written_whole(place) as new:
        new.write_text(aggregation_sql(table, columns, config), encoding="utf-8")
    logger.info("SQL 已保存 saved: %s", place)
    return SqlResult(place)


def _make(config: PairsConfig, new: Path, folder: Path, spill: Path) -> PairsResult:
    start, funnel = time.perf_counter(), Funnel()
    log = open_table(
        config.log_path, config.file_patterns, "log_path", "columns", spill,
        columns=config.columns, separator=config.separator,
    )  # fmt: skip
    columns = find_columns(log, config)
    items = open_table(
        config.catalogue_path, config.file_patterns, "catalogue_path", "catalogue_columns", spill,
        columns=config.catalogue_columns,
    )  # fmt: skip
    catalogue = open_catalogue(items, config.id_column, config.text_template)
    counted = count_rows(log, columns, config, spill)
    _say_rows(config, counted, funnel)
    last_trained, first_heldout = _split(config, counted)
    bias = position_bias(config, counted, last_trained)
    logger.info("位置偏差 position bias: %s", bias.source)
    work = _Work(config, counted, catalogue, bias, funnel)

    trained, lost = _training_pairs(work, last_trained)
    outputs.write_pairs(new / outputs.PAIRS_FILE, trained, anchor_ids=config.query_is_item)
    counts = {"pairs": len(trained), "queries": trained[KEY].n_unique(), "items": trained[TEXT].n_unique()}
    queries = None
    if first_heldout:
        held, queries, lost_held = _heldout(work, first_heldout, trained)
        lost = lost.vstack(lost_held)
        outputs.write_heldout(new / outputs.HELDOUT_FOLDER, queries, held)
        catalogue.write_corpus(new / outputs.HELDOUT_FOLDER / CORPUS_FILE)
        counts |= {"heldout_queries": len(queries), "heldout_pairs": len(held)}
    counts["rejects"] = outputs.write_rejects(new / outputs.REJECTS_FILE, rejected_rows(counted), lost)
    outputs.write_presets(new, folder, with_heldout=first_heldout is not None)
    config.save(new / outputs.CONFIG_FILE)
    if columns.event:
        (new / outputs.SQL_FILE).write_text(aggregation_sql("click_log", columns, config), encoding="utf-8")
    tables = report_tables(trained, queries, funnel, bias, config.seed)
    page = report_page(config, trained, queries, tables, bias=bias, counted=counted)
    (new / outputs.HTML_FILE).write_text(page, encoding="utf-8")
    shutil.rmtree(spill)
    _write_manifest(work, new, log, counts, time.perf_counter() - start)

    logger.info("%s", as_text(tables["funnel"]), extra=RESULT)
    logger.info("训练样本已保存 pairs saved: %s", folder / outputs.PAIRS_FILE)
    return PairsResult(
        folder=folder,
        pairs=folder / outputs.PAIRS_FILE,
        heldout=folder / outputs.HELDOUT_FOLDER if first_heldout else None,
        rejects=folder / outputs.REJECTS_FILE,
        report_html=folder / outputs.HTML_FILE,
        manifest=folder / outputs.MANIFEST_FILE,
        finetune_preset=folder / outputs.FINETUNE_PRESET,
        evaluate_preset=folder / outputs.EVALUATE_PRESET if first_heldout else None,
        counts=counts,
        tables=tables,
    )


# --- rows ---------------------------------------------------------------------------------------------------------


def _say_rows(config: PairsConfig, counted: Counted, funnel: Funnel) -> None:
    """Fill the funnel's rows, warn of what looks wrong.

    :raises DataError: too many rows cannot be used, or none are left.
    """
    if not counted.rows:
        raise DataError(f"log_path {config.log_path}: no rows; is the first row a header? Else name the columns")
    left = counted.rows
    funnel.add(ROWS, "read", 0, left)
    bad = sorted((-count, reason) for reason, count in counted.reasons.items() if reason not in (BOT, ID_QUERY))
    decided = {BOT: counted.reasons[BOT], DUPLICATE: counted.duplicates, ID_QUERY: counted.reasons[ID_QUERY]}
    for reason, out in ({reason: -count for count, reason in bad} | decided).items():
        if out or reason == DUPLICATE:
            left -= out
            funnel.add(ROWS, reason, out, left, counted.examples.get(reason, ()))
    reasons = [reason for _, reason in bad]
    unknown = unknown_events(counted.unknown_events, config)
    share = sum(counted.reasons[reason] for reason in reasons) / counted.rows
    if share > config.max_rejected_share:
        found = "; ".join(f"{counted.reasons[name]} {name} (such as {counted.examples[name][0]!r})" for name in reasons)
        advice = f". Events: {unknown}" if UNKNOWN_EVENT in reasons else ""
        advice += ". time_format says how times are written" if {BAD_TIME, FAR_TIME} & set(reasons) else ""
        raise DataError(
            f"log_path {config.log_path}: {share:.0%} of {counted.rows} rows cannot be used (max_rejected_share "
            f"{config.max_rejected_share}): {found}{advice}"
        )
    if UNKNOWN_EVENT in reasons:
        logger.warning("未知事件 unknown events: %d rows; %s", counted.reasons[UNKNOWN_EVENT], unknown)
    if counted.duplicates > counted.used:
        logger.warning("重复行 equal rows: %d of %d; was the log exported twice?", counted.duplicates, counted.rows)
    if counted.spellings > counted.queries:
        logger.info("合并查询 queries merged: %d spellings of %d queries", counted.spellings, counted.queries)
    _warn_of_times(config, counted)
    missing = [name for name in config.events if not counted.events[name]]
    if missing:
        logger.warning("没有这些事件 no events of these names: %s", ", ".join(missing))
    if not any(counted.events[name] for name in config.weights):
        raise DataError(_nothing_left(config, funnel, ROWS))


def _warn_of_times(config: PairsConfig, counted: Counted) -> None:
    """Warn of times in several forms, and of days without a row."""
    clocks = {CLOCKS[number]: count for number, count in sorted(counted.clocks.items())}
    if len(clocks) > 1:
        shown = ", ".join(f"{count} rows have {name}" for name, count in clocks.items())
        logger.warning("时间写法不一 times are written in several ways: %s", shown)
    if {ZONED, EPOCH} & set(clocks) and set(clocks) - {ZONED, EPOCH, DATE}:
        logger.warning("无时区的时间按 %s times without a zone are taken to be in it (time_zone)", config.time_zone)
    if counted.days:
        first, last = min(counted.days), max(counted.days)
        every = {first + timedelta(days=number) for number in range((last - first).days)}
        if empty := sorted(every - counted.days):
            shown = ", ".join(map(str, empty[:SHOWN_DAYS])) + (" …" if len(empty) > SHOWN_DAYS else "")
            logger.warning("没有数据的日期 days without a row between %s and %s: %s", first, last, shown)


def _split(config: PairsConfig, counted: Counted) -> tuple[date | None, date | None]:
    """The last day of training and the first that is held out; None without held-out days.

    :raises DataError: there are no days, or too few.
    """
    if not config.holdout_days:
        return max(counted.days, default=None), None
    if not counted.days:
        raise DataError("holdout_days: the log has no column of times to split by; name it (time_column), or set 0")
    first, last = min(counted.days), max(counted.days)
    split = last - timedelta(days=config.holdout_days - 1)
    if split <= first:
        raise DataError(
            f"holdout_days: {config.holdout_days} of the {(last - first).days + 1} days from {first} to {last} leave "
            "none to train on; set fewer"
        )
    trained = split - timedelta(days=1)
    logger.info("按时间划分 split by time: training %s to %s, held out %s to %s", first, trained, split, last)
    return trained, split


def _nothing_left(config: PairsConfig, funnel: Funnel, of: str) -> str:
    steps = "; ".join(f"{step}: {left} left" for kind, step, out, left, _ in funnel if kind == of and out)
    none = f"the log has none of {', '.join(config.weights)}"
    return f"log_path {config.log_path}: no {of} are left with a click; {steps or none}"


# --- pairs --------------------------------------------------------------------------------------------------------


def _training_pairs(work: _Work, last: date | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs with texts, weights and languages, and negatives if asked for; and pairs whose item or query has no text.

    :raises DataError: none are left, or there are no impressions to take negatives from.
    """
    config, funnel = work.config, work.funnel
    pairs, lost = _with_texts(work, TRAIN, None, last)
    kept = choose.keep_languages(pairs, config.queries_per_language, config.seed)
    if config.queries_per_language:
        funnel.add(TRAIN, "over queries_per_language", len(pairs) - len(kept), len(kept))
    for knob, group in (("max_items_per_query", KEY), ("max_queries_per_item", TEXT)):
        before, kept = len(kept), choose.keep_heaviest(kept, group, getattr(config, knob))
        funnel.add(TRAIN, f"over {knob}", before - len(kept), len(kept))
    if not len(kept):
        raise DataError(_nothing_left(config, funnel, TRAIN))
    pairs = choose.heaviest_first(choose.weigh(kept, config.damping))
    if config.exposed_negatives:
        if not work.counted.events[config.impression_event]:
            raise DataError(
                "exposed_negatives: the log has no impressions; set 0, or name the event (impression_event)"
            )
        unclicked = choose.unclicked_items(config, work.counted, pairs, work.bias, last)
        texts = work.catalogue.texts(unclicked[ITEM])
        pairs = choose.with_negatives(config, pairs, unclicked.join(texts, on=ITEM, how="inner", maintain_order="left"))
        with_some = pairs["negative"].count()
        logger.info("曝光未点击负例 pairs with exposed, unclicked negatives: %d of %d", with_some, len(pairs))
    return pairs, lost


def _heldout(work: _Work, first: date, trained: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Held-out pairs, their queries with what training has seen of them, and pairs whose item has no text.

    :raises DataError: none are left.
    """
    pairs, lost = _with_texts(work, HELDOUT, first, None)
    keys = pairs.select(KEY).unique().sort(KEY)
    if work.config.max_heldout_queries and len(keys) > work.config.max_heldout_queries:
        drawn = keys.sample(work.config.max_heldout_queries, seed=work.config.seed)
        before, pairs = len(pairs), pairs.join(drawn, on=KEY, how="semi", maintain_order="left")
        work.funnel.add(HELDOUT, "over max_heldout_queries", before - len(pairs), len(pairs))
    if not len(pairs):
        raise DataError(_nothing_left(work.config, work.funnel, HELDOUT))
    marked = pairs.with_columns(pl.col(TEXT).is_in(trained[TEXT].unique().implode()).alias("seen"))
    of_query = marked.group_by(KEY, ANCHOR).agg(pl.col("seen").all().alias("all"), pl.col("seen").any().alias("any"))
    seen, some, unseen = pl.lit("seen"), pl.lit("some"), pl.lit("unseen")
    known = pl.col(KEY).is_in(trained[KEY].unique().implode())
    return pairs, of_query.sort(KEY).select(
        KEY,
        ANCHOR,
        pl.when(known).then(seen).otherwise(unseen).alias(QUERY_SEEN),
        pl.when("all").then(seen).when("any").then(some).otherwise(unseen).alias(ITEMS_SEEN),
    ), lost  # fmt: skip


def _with_texts(work: _Work, of: str, first: date | None, last: date | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The pairs of the days from `first` to `last` with the texts of queries and items; and those that lack one.

    :raises DataError: too many pairs have an item without a text.
    """
    config, funnel = work.config, work.funnel
    pairs = choose.choose_pairs(config, work.counted, work.bias, funnel, of, first=first, last=last)
    joined = pairs.join(work.catalogue.texts(pairs[ITEM]), on=ITEM, how="left", maintain_order="left")
    if config.query_is_item:
        anchors = work.catalogue.texts(pairs[KEY]).rename({ITEM: KEY, TEXT: ANCHOR})
    else:
        names = pl.concat([pl.scan_parquet(path) for path in work.counted.names])
        anchor = pl.col(QUERY).str.replace_all(r"\s+", " ").str.strip_chars(" ").alias(ANCHOR)
        anchors = names.join(pairs.lazy(), on=KEY, how="semi").select(KEY, anchor).collect()
    joined = joined.join(anchors, on=KEY, how="left", maintain_order="left")
    no_text, no_anchor = pl.col(TEXT).is_null(), pl.col(ANCHOR).is_null()
    lost, kept = joined.filter(no_text | no_anchor), joined.filter(~(no_text | no_anchor))
    without = pl.concat([lost.filter(no_text)[ITEM], lost.filter(no_anchor)[KEY].alias(ITEM)])
    missing = without.unique(maintain_order=True)
    shown = ", ".join(missing[:3])
    if len(lost) > config.max_rejected_share * len(joined):
        examples = work.catalogue.frame.select(ITEM).head(3).collect()[ITEM]
        raise DataError(
            f"{len(lost) / len(joined):.0%} of {len(joined)} {of} name an item that catalogue_path "
            f"{config.catalogue_path} does not have: {shown}; its ids look like {', '.join(examples)}. Is it the "
            "right id column (item_column, id_column)?"
        )
    funnel.add(of, NO_TEXT, len(lost), len(kept), missing[:3].to_list())
    if len(missing):
        logger.warning(
            "商品库中没有 items without text in the catalogue: %d (%s), pairs left out: %d",
            len(missing), shown, len(lost),
        )  # fmt: skip
    others = kept.filter(pl.col(TEXT).str.to_lowercase() != pl.col(ANCHOR).str.to_lowercase())
    funnel.add(of, "query and item of equal text", len(kept) - len(others), len(others))
    merged = choose.merge_equal_texts(others)
    funnel.add(of, "items of equal text merged", len(others) - len(merged), len(merged))
    return merged, lost.select(
        pl.lit(NO_TEXT).alias("reason"), pl.col(KEY).alias("query"), pl.col(ITEM).alias("item_id"), CLICKS
    )


def _write_manifest(work: _Work, new: Path, log: Table, counts: Mapping[str, int], seconds: float) -> None:
    written = sorted(path for path in new.rglob("*") if path.is_file())
    counted = work.counted
    manifest = {
        "counts": counts,
        "rows": {"read": counted.rows, "used": counted.used, "events": counted.events},
        "days": [str(min(counted.days)), str(max(counted.days))] if counted.days else None,
        "propensities": {"source": work.bias.source, "by_position": work.bias.propensities},
        "funnel": [dict(zip(("of", "step", "left_out", "left"), step[:4], strict=True)) for step in work.funnel],
        "log": [{"file": str(file), "bytes": file.stat().st_size} for file in log.files],
        "sha256": {path.relative_to(new).as_posix(): sha256_of(path) for path in written},
        "seconds": round(seconds, 2),
        "config": work.config.to_dict(),
    }
    write_json(new / outputs.MANIFEST_FILE, manifest)
