"""Extension stage: make training pairs and held-out queries out of a click log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pandas import DataFrame

from ebr_lib.errors import DataError
from ebr_lib.files import check_apart, check_replaceable, make_folder, sha256_of, write_json, written_whole
from ebr_lib.logs import RESULT, logger
from ebr_lib.pairs import choose, outputs
from ebr_lib.pairs.bias import Bias, given_propensities
from ebr_lib.pairs.catalogue import Catalogue, open_catalogue
from ebr_lib.pairs.choose import CLICKS, SCORE, TEXT, Chosen, Rules, choose_pairs, estimated_bias
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.pairs.counts import Counted, bot_sessions, count_rows, rejected_rows
from ebr_lib.pairs.funnel import HELDOUT, ROWS, TRAIN, Funnel
from ebr_lib.pairs.report import Report, overview
from ebr_lib.pairs.rows import (
    BAD_TIME,
    BOT,
    CLOCKS,
    DATE,
    EPOCH,
    FAR_TIME,
    ID_QUERY,
    ITEM,
    KEY,
    QUERY,
    UNKNOWN_EVENT,
    ZONED,
    Columns,
    Meaning,
    find_columns,
    marked_rows,
    unknown_events,
)
from ebr_lib.pairs.sources import Table, open_table
from ebr_lib.pairs.sql import aggregation_sql
from ebr_lib.tables import TableRepr, as_text, html_folded, html_link, html_verdict

if TYPE_CHECKING:
    import polars as pl

DECISIONS = (ID_QUERY, BOT)
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
    rules: Rules
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
        return _write_sql(config, folder)
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
    import polars as pl

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


def _make(config: PairsConfig, new: Path, folder: Path, spill: Path) -> PairsResult:
    start, funnel = time.perf_counter(), Funnel()
    rules, meaning = _rules(config), _meaning(config)
    log = open_table(
        config.log_path, config.file_patterns, "log_path", "columns", spill,
        columns=config.columns, separator=config.separator,
    )  # fmt: skip
    columns = find_columns(log, _given(config), config.count_columns, rules.click)
    catalogue = open_catalogue(_catalogue_table(config, spill), config.id_column, config.text_template)
    counted = _count(config, log, columns, meaning, spill)
    _say_rows(config, counted, meaning, funnel)
    last_trained, first_heldout = _split(config, counted)
    bias = _bias(config, counted, rules, last_trained)
    logger.info("位置偏差 position bias: %s", bias.source)
    work = _Work(config, counted, catalogue, rules, bias, funnel)

    train = choose_pairs(counted, rules, bias, None, last_trained)
    heldout = choose_pairs(counted, rules, bias, first_heldout, None) if first_heldout else None
    funnel.add_all(TRAIN, train.steps)
    trained, lost = _training_pairs(work, train)
    if not len(trained):
        raise DataError(_nothing_left(config, funnel, TRAIN))
    if config.exposed_negatives:
        trained = _negatives(work, trained, last_trained)
    outputs.write_pairs(new / outputs.PAIRS_FILE, trained, anchor_ids=config.query_is_item)
    held = queries = None
    if heldout:
        funnel.add_all(HELDOUT, heldout.steps)
        held, queries, lost_held = _heldout(work, heldout, trained)
        if not len(held):
            raise DataError(_nothing_left(config, funnel, HELDOUT))
        lost = lost.vstack(lost_held)
        outputs.write_heldout(new / outputs.HELDOUT_FOLDER, queries, held, catalogue)
    rejects = outputs.write_rejects(new / outputs.REJECTS_FILE, rejected_rows(counted, DECISIONS), lost)
    outputs.write_presets(new, folder, with_heldout=held is not None)
    config.save(new / outputs.CONFIG_FILE)
    if columns.event:
        (new / outputs.SQL_FILE).write_text(_sql(config, "click_log", columns), encoding="utf-8")
    counts = _totals(trained, held, queries) | {"rejects": rejects}
    report = overview(trained, held, queries, funnel=funnel, bias=bias, counted=counted, rules=rules, seed=config.seed)
    with (new / outputs.HTML_FILE).open("w", encoding="utf-8") as out:
        out.write(report.html())
    shutil.rmtree(spill)
    _write_manifest(work, new, log, counts, time.perf_counter() - start)
    return _result(folder, counts, report, held is not None)


def _result(folder: Path, counts: dict[str, int], report: Report, with_heldout: bool) -> PairsResult:
    logger.info("%s", as_text(report.tables["funnel"]), extra=RESULT)
    logger.info("训练样本已保存 pairs saved: %s", folder / outputs.PAIRS_FILE)
    return PairsResult(
        folder=folder,
        pairs=folder / outputs.PAIRS_FILE,
        heldout=folder / outputs.HELDOUT_FOLDER if with_heldout else None,
        rejects=folder / outputs.REJECTS_FILE,
        report_html=folder / outputs.HTML_FILE,
        manifest=folder / outputs.MANIFEST_FILE,
        finetune_preset=folder / outputs.FINETUNE_PRESET,
        evaluate_preset=folder / outputs.EVALUATE_PRESET if with_heldout else None,
        counts=counts,
        tables=report.tables,
    )


# --- knobs as the parts take them ---------------------------------------------------------------------------------


def _rules(config: PairsConfig) -> Rules:
    return Rules(
        events={name: weight for name, weight in config.event_weights.items() if weight},
        impression=config.impression_event,
        min_impressions=config.min_impressions,
        min_clicks=config.min_clicks,
        min_ctr_ratio=config.min_ctr_ratio,
        prior_strength=config.prior_strength,
        max_correction=config.max_correction,
        half_life_days=config.half_life_days,
    )


def _meaning(config: PairsConfig) -> Meaning:
    return Meaning(
        events=(config.impression_event, *(name for name, weight in config.event_weights.items() if weight)),
        ignored=tuple(name for name, weight in config.event_weights.items() if not weight),
        query_is_item=config.query_is_item,
        time_format=config.time_format,
        time_zone=config.time_zone,
    )


def _given(config: PairsConfig) -> dict[str, str | None]:
    return {
        "query": config.query_column,
        "item": config.item_column,
        "event": config.event_column,
        "time": config.time_column,
        "position": config.position_column,
        "session": config.session_column,
    }


def _catalogue_table(config: PairsConfig, spill: Path) -> Table:
    return open_table(
        config.catalogue_path, config.file_patterns, "catalogue_path", "catalogue_columns", spill,
        columns=config.catalogue_columns,
    )  # fmt: skip


def _write_sql(config: PairsConfig, folder: Path) -> SqlResult:
    """Write the query for a table whose columns are as the knobs name them, or the first of the usual names."""
    usual = {"query": "query", "item": "item_id", "event": "event", "time": "time", "position": None, "session": None}
    names = {name: given or usual[name] for name, given in _given(config).items()}
    columns = Columns(**names, counts={})  # type: ignore[arg-type] # query and item have a usual name
    place = make_folder(folder) / outputs.SQL_FILE
    with written_whole(place) as new:
        new.write_text(_sql(config, str(config.sql_table), columns), encoding="utf-8")
    logger.info("SQL 已保存 saved: %s", place)
    return SqlResult(place)


def _sql(config: PairsConfig, table: str, columns: Columns) -> str:
    return aggregation_sql(
        table,
        columns,
        _meaning(config),
        config.count_columns,
        drop_duplicates=config.drop_duplicates,
        max_session_events=config.max_session_events,
    )


# --- rows ---------------------------------------------------------------------------------------------------------


def _count(config: PairsConfig, log: Table, columns: Columns, meaning: Meaning, spill: Path) -> Counted:
    rows = marked_rows(log.scan(columns.read, columns.time), columns, meaning)
    bots = bot_sessions(rows, config.max_session_events) if columns.session and config.max_session_events else None
    return count_rows(
        rows,
        meaning.events,
        spill,
        log.size,
        bots,
        drop_duplicates=config.drop_duplicates,
        drop_ids=config.drop_id_queries and not config.query_is_item,
    )


def _say_rows(config: PairsConfig, counted: Counted, meaning: Meaning, funnel: Funnel) -> None:
    """Fill the funnel's rows, warn of what looks wrong.

    :raises DataError: too many rows cannot be used, or none are left.
    """
    if not counted.rows:
        raise DataError(f"log_path {config.log_path}: no rows; is the first row a header? Else name the columns")
    left = counted.rows
    funnel.add(ROWS, "read", 0, left)
    out = dict(counted.reasons) | {"equal to another row": counted.duplicates}
    order = (BOT, "equal to another row", ID_QUERY)
    for reason in sorted(out, key=lambda name: (order.index(name) + 1 if name in order else 0, -out[name], name)):
        left -= out[reason]
        funnel.add(ROWS, reason, out[reason], left, counted.examples.get(reason, ()))
    bad = {reason: count for reason, count in counted.reasons.items() if reason not in DECISIONS}
    if sum(bad.values()) > config.max_rejected_share * counted.rows:
        raise DataError(_too_many(config, counted, bad, meaning))
    if UNKNOWN_EVENT in bad:
        logger.warning("未知事件 unknown events: %d rows; %s", bad[UNKNOWN_EVENT], _unknown(counted, meaning))
    if counted.duplicates > counted.used:
        logger.warning("重复行 equal rows: %d of %d; was the log exported twice?", counted.duplicates, counted.rows)
    if counted.spellings > counted.queries:
        logger.info("合并查询 queries merged: %d spellings of %d queries", counted.spellings, counted.queries)
    _warn_of_times(config, counted)
    missing = [name for name in meaning.events if not counted.events[name]]
    if missing:
        logger.warning("没有这些事件 no events of these names: %s", ", ".join(missing))
    if not any(counted.events[name] for name in meaning.events[1:]):
        raise DataError(_nothing_left(config, funnel, ROWS))


def _too_many(config: PairsConfig, counted: Counted, bad: Mapping[str, int], meaning: Meaning) -> str:
    reasons = "; ".join(
        f"{count} {reason} (such as {counted.examples[reason][0]!r})"
        for reason, count in sorted(bad.items(), key=lambda found: (-found[1], found[0]))
    )
    advice = f". Events: {_unknown(counted, meaning)}" if UNKNOWN_EVENT in bad else ""
    if {BAD_TIME, FAR_TIME} & set(bad):
        advice += ". time_format says how times are written"
    share = sum(bad.values()) / counted.rows
    return (
        f"log_path {config.log_path}: {share:.0%} of {counted.rows} rows cannot be used (max_rejected_share "
        f"{config.max_rejected_share}): {reasons}{advice}"
    )


def _unknown(counted: Counted, meaning: Meaning) -> str:
    return unknown_events(counted.unknown_events, meaning)


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


def _bias(config: PairsConfig, counted: Counted, rules: Rules, last: date | None) -> Bias:
    """The propensities that the knob gives, or asks to estimate from the days up to `last`.

    :raises DataError: the log cannot give them.
    """
    wanted = config.propensities
    if wanted == "none":
        return Bias({}, "none")
    shown = counted.events[rules.impression]
    if not counted.positions or (not shown and isinstance(wanted, str)):
        lacking = "positions" if not counted.positions else "impressions"
        if wanted == "auto":
            return Bias({}, f"none: the log has no {lacking}")
        raise DataError(f"propensities: the log has no {lacking}; name their column, or set propensities: none")
    if not isinstance(wanted, str):
        return Bias(given_propensities(wanted, counted.first_position), "given")
    bias = estimated_bias(counted, rules, last)
    if not bias.propensities and wanted == "estimate":
        raise DataError(
            "propensities: too few clicks are on items that were shown at several positions to estimate them; "
            "give them as a list, or set propensities: none"
        )
    return bias


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
    logger.info(
        "按时间划分 split by time: training %s to %s, held out %s to %s", first, split - timedelta(days=1), split, last
    )
    return split - timedelta(days=1), split


# --- pairs --------------------------------------------------------------------------------------------------------


def _training_pairs(work: _Work, chosen: Chosen) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs with texts, weights and languages; and those whose item or query has no text."""
    pairs, lost = _with_texts(work, chosen.pairs, TRAIN)
    names = pairs.select(KEY, outputs.ANCHOR).unique(KEY, maintain_order=True)
    kept = choose.keep_languages(pairs, names, work.config.queries_per_language, work.config.seed)
    if work.config.queries_per_language:
        work.funnel.add(TRAIN, "over queries_per_language", len(pairs) - len(kept), len(kept))
    for knob, group in (("max_items_per_query", KEY), ("max_queries_per_item", TEXT)):
        before, kept = len(kept), choose.keep_heaviest(kept, group, getattr(work.config, knob))
        work.funnel.add(TRAIN, f"over {knob}", before - len(kept), len(kept))
    if len(kept):
        kept = choose.weigh(kept, work.config.damping)
    return kept.sort(KEY, SCORE, ITEM, descending=[False, True, False]), lost


def _with_texts(work: _Work, pairs: pl.DataFrame, of: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Join the texts of queries and items.

    :raises DataError: too many pairs have an item without a text.
    """
    import polars as pl

    texts = work.catalogue.texts(pairs.select(ITEM))
    joined = pairs.join(texts, on=ITEM, how="left", maintain_order="left")
    if work.config.query_is_item:
        anchors = work.catalogue.texts(pairs.select(pl.col(KEY).alias(ITEM))).rename({ITEM: KEY, TEXT: outputs.ANCHOR})
    else:
        anchors = work.counted.names_of(pairs.select(KEY).unique()).rename({QUERY: outputs.ANCHOR})
        anchors = anchors.with_columns(pl.col(outputs.ANCHOR).str.replace_all(r"\s+", " ").str.strip_chars(" "))
    joined = joined.join(anchors, on=KEY, how="left", maintain_order="left")
    no_text = pl.col(TEXT).is_null() | pl.col(outputs.ANCHOR).is_null()
    lost, kept = joined.filter(no_text), joined.filter(~no_text)
    missing = lost.filter(pl.col(TEXT).is_null())[ITEM].to_list() + (
        lost.filter(pl.col(outputs.ANCHOR).is_null())[KEY].to_list() if work.config.query_is_item else []
    )
    missing = list(dict.fromkeys(missing))
    if len(lost) > work.config.max_rejected_share * len(joined):
        raise DataError(
            f"{len(lost) / len(joined):.0%} of {len(joined)} {of} name an item that catalogue_path "
            f"{work.config.catalogue_path} does not have: {', '.join(missing[:3])}; its ids look like "
            f"{', '.join(work.catalogue.examples())}. Is it the right id column (item_column, id_column)?"
        )
    work.funnel.add(of, "item without text in the catalogue", len(lost), len(kept), missing[:3])
    if missing:
        logger.warning(
            "商品库中没有 items without text in the catalogue: %d (%s), pairs left out: %d", len(missing),
            ", ".join(missing[:3]), len(lost),
        )  # fmt: skip
    own = pl.col(TEXT).str.to_lowercase() == pl.col(outputs.ANCHOR).str.to_lowercase()
    others = kept.filter(~own)
    work.funnel.add(of, "query and item of equal text", len(kept) - len(others), len(others))
    merged = choose.merge_equal_texts(others, work.rules).join(anchors, on=KEY, how="left", maintain_order="left")
    work.funnel.add(of, "items of equal text merged", len(others) - len(merged), len(merged))
    reason = pl.lit("item without text in the catalogue").alias("reason")
    return merged, lost.select(reason, pl.col(KEY).alias("query"), pl.col(ITEM).alias("item_id"), CLICKS)


def _negatives(work: _Work, pairs: pl.DataFrame, last: date | None) -> pl.DataFrame:
    """Add negatives to a share of the pairs."""
    if not work.counted.events[work.rules.impression]:
        raise DataError("exposed_negatives: the log has no impressions; set 0, or name the event (impression_event)")
    least, most = work.config.negative_min_impressions, work.config.negatives_per_pair
    unclicked = choose.unclicked_items(work.counted, pairs, work.rules, work.bias, last, least=least, most=4 * most)
    unclicked = unclicked.join(work.catalogue.texts(unclicked), on=ITEM, how="inner", maintain_order="left")
    pairs = choose.with_negatives(pairs, unclicked, work.config.exposed_negatives, most, work.config.seed)
    with_some = len(pairs) - int(pairs["negative"].null_count())
    logger.info("曝光未点击负例 pairs with exposed, unclicked negatives: %d of %d", with_some, len(pairs))
    return pairs


def _heldout(work: _Work, chosen: Chosen, trained: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Held-out pairs, their queries with what training has seen of them, and pairs whose item has no text."""
    import polars as pl

    pairs, lost = _with_texts(work, chosen.pairs, HELDOUT)
    keys = pairs.select(KEY).unique().sort(KEY)
    if work.config.max_heldout_queries and len(keys) > work.config.max_heldout_queries:
        drawn = keys.sample(work.config.max_heldout_queries, seed=work.config.seed)
        before, pairs = len(pairs), pairs.join(drawn, on=KEY, how="semi", maintain_order="left")
        work.funnel.add(HELDOUT, "over max_heldout_queries", before - len(pairs), len(pairs))
    yes = pl.lit(True).alias("seen")
    of_item = pairs.join(trained.select(TEXT).unique().with_columns(yes), on=TEXT, how="left")
    queries = of_item.group_by(KEY, outputs.ANCHOR).agg(pl.col("seen").fill_null(False).mean().alias("share")).sort(KEY)
    queries = queries.join(trained.select(KEY).unique().with_columns(yes), on=KEY, how="left", maintain_order="left")
    known, share = pl.col("seen").fill_null(False), pl.col("share")
    return pairs, queries.select(
        KEY,
        outputs.ANCHOR,
        pl.when(known).then(pl.lit("seen")).otherwise(pl.lit("unseen")).alias(outputs.QUERY_SEEN),
        pl.when(share == 1).then(pl.lit("seen")).when(share == 0).then(pl.lit("unseen")).otherwise(pl.lit("some"))
        .alias(outputs.ITEMS_SEEN),
    ), lost  # fmt: skip


def _nothing_left(config: PairsConfig, funnel: Funnel, of: str) -> str:
    none = f"the log has none of {', '.join(name for name, weight in config.event_weights.items() if weight)}"
    steps = "; ".join(f"{step}: {left} left" for kind, step, out, left, _ in funnel.steps if kind == of and out)
    return f"log_path {config.log_path}: no {of} are left with a click; {steps or none}"


def _totals(trained: pl.DataFrame, held: pl.DataFrame | None, queries: pl.DataFrame | None) -> dict[str, int]:
    counts = {"pairs": len(trained), "queries": trained[KEY].n_unique(), "items": trained[TEXT].n_unique()}
    if held is not None and queries is not None:
        counts |= {"heldout_queries": len(queries), "heldout_pairs": len(held)}
    return counts


def _write_manifest(work: _Work, new: Path, log: Table, counts: Mapping[str, int], seconds: float) -> None:
    written = sorted(path for path in new.rglob("*") if path.is_file())
    manifest = {
        "counts": dict(counts),
        "rows": {"read": work.counted.rows, "used": work.counted.used, "events": dict(work.counted.events)},
        "days": [str(min(work.counted.days)), str(max(work.counted.days))] if work.counted.days else None,
        "propensities": {"source": work.bias.source, "by_position": dict(work.bias.propensities)},
        "funnel": [dict(zip(("of", "step", "left_out", "left"), step[:4], strict=True)) for step in work.funnel.steps],
        "log": [{"file": str(file), "bytes": file.stat().st_size} for file in log.files],
        "sha256": {path.relative_to(new).as_posix(): sha256_of(path) for path in written},
        "seconds": round(seconds, 2),
        "config": work.config.to_dict(),
    }
    write_json(new / outputs.MANIFEST_FILE, manifest)
