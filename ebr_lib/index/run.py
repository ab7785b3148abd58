"""Extension stage: a Faiss index, or a Milvus collection, over an embedding file, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.arrays import Vectors
from ebr_lib.data.advice import Advice, read_advice
from ebr_lib.data.bm25 import Bm25
from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.data.embeddings.files import files_of, iter_embeddings
from ebr_lib.data.queries import read_queries
from ebr_lib.errors import DataError
from ebr_lib.files import check_apart, make_folder, write_json
from ebr_lib.index.after import text_column
from ebr_lib.index.build import (
    Built,
    build_index,
    new_index,
    plan_index,
    sample_rows,
    size_of_file,
    trained_index,
    write_bm25,
)
from ebr_lib.index.config import IndexConfig
from ebr_lib.index.faiss_tools import Plan
from ebr_lib.index.measure import Point, draw_curve, remedies, sweep
from ebr_lib.index.milvus import KIND, Server
from ebr_lib.index.milvus_upload import Collection, build_collection, kind_in, new_collection, plan_collection
from ebr_lib.index.search import query_encoder, query_spec
from ebr_lib.index.store import (
    BM25_FILE,
    CONFIG_FILE,
    CURVE_FILE,
    LITE_FILE,
    MANIFEST_FILE,
    ROW,
    ROWS_FILE,
    changed_together,
    check_folder,
    locked,
)
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.provenance import Provenance, identify
from ebr_lib.tables import TableRepr, html_folded, html_verdict, make_table

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class IndexResult(TableRepr):
    """What was built and measured. `points` are the settings tried, `chosen` the one that is saved."""

    folder: Path
    kind: str
    why: str
    rows: int
    dimension: int
    build_seconds: float
    bytes_per_vector: float
    points: tuple[Point, ...]
    chosen: Point
    knob: str | None
    measured_on: str
    tables: dict[str, DataFrame] = field(compare=False)

    def _repr_html_(self) -> str:
        said = (
            f"索引 index {self.kind}: recall@10 {self.chosen.recall:.3f}, {self.chosen.p50:.2f} ms per query (median); "
            f"{self.rows:,} 行 rows, {self.bytes_per_vector:,.0f} bytes each"
        )
        return html_verdict(said) + html_folded(self.tables.values(), "各档设置 settings")


def build_faiss_index(config: IndexConfig | Mapping[str, Any] | None = None) -> IndexResult:
    """Build an index over an embedding file, measure it, choose its setting, and write it whole to `output_dir`.

    :param config: an IndexConfig, a dict of its knobs, or None for the defaults.
    :raises ConfigError: a knob is unknown or out of range (all are listed), `kind` is not a factory string, or
        `output_dir` holds other files than an index.
    :raises DataError: the embedding file is broken, the queries' model is not the one that made it, or Milvus is not
        reached any more; the same call then continues.
    :raises MissingError: the embedding file is not there; run the inference stage first.
    """
    config = IndexConfig.resolve(config)
    look_for_models(config.base_model_path, config.hub)
    path, folder = config.embedding_path, Path(config.output_dir)
    make_folder(folder if folder.is_dir() else folder.parent)
    check_folder(folder, config.kind, is_milvus=kind_in(config.kind) is not None)
    check_apart([folder], [*files_of(path), config.queries_path, config.presets])
    made_by = read_manifest(path) or {}
    rows, dim = size_of_file(path, made_by)
    contract = _contract(config, made_by, dim)
    _check_columns(path, config.id_column)
    words = _words_column(config, made_by) if config.hybrid else None
    advice = _advice(config, made_by)
    if not made_by:
        logger.warning("%s 没有清单 has no manifest: no search can check that its model made it", path)
    with locked(folder):
        plan, index = _empty_index(config, folder, rows, contract)
        queries = _real_queries(config, made_by, dim)
        is_auto, effort = config.kind == "auto", config.ef_construction
        plan, index = trained_index(path, plan, index, rows, ef_construction=effort, is_auto=is_auto, seed=config.seed)
        logger.info("索引类型: %s (%s; %d dimensions)", plan.factory, plan.why, dim)
        with changed_together(folder) as new:
            sample = sample_rows(rows, 0 if queries is not None else config.measure_queries, config.seed)
            if isinstance(index, Collection):
                built = build_collection(path, index, new, words=words, sample=sample, queries=queries)
            else:
                built = build_index(path, index, new, sample, queries)
            if words:
                write_bm25(new, Bm25(), words)
            points, chosen = _measure(built, plan, config.target_recall)
            draw_curve(new / CURVE_FILE, plan, points, chosen, config.target_recall)
            result = _result(config, plan, built, points, chosen)
            about = _manifest(config, contract, result, built) | {"advice": asdict(advice)}
            about |= {"hybrid": {"column": words}} if words else {}
            if isinstance(index, Collection):
                about |= index.publish(config.uri, config.milvus_token_file)
            write_json(new / MANIFEST_FILE, about)
            config.save(new / CONFIG_FILE)
        if isinstance(index, Collection):
            index.finish()
        if not words:  # of an earlier build, which no manifest names now
            for name in (BM25_FILE, *((ROWS_FILE,) if isinstance(index, Collection) else ())):
                (folder / name).unlink(missing_ok=True)
    logger.info("%s", result, extra=RESULT)
    if words or advice.reranking:
        logger.info("检索排序 searches: %s", advice.sentence, extra=RESULT)
    logger.info("索引已保存 index saved: %s", folder)
    return result


def _empty_index(config: IndexConfig, folder: Path, rows: int, contract: dict[str, Any]) -> tuple[Plan, Any]:
    """The plan, and an index of Faiss or a collection of Milvus to fill; an unusable kind is refused here, before
    queries are encoded."""
    effort, dim = config.ef_construction, int(contract["dimension"])
    if (inner := kind_in(config.kind)) is None:
        plan = plan_index(rows, dim, config.kind, config.compression)
        return plan, new_index(plan, dim, effort)
    plan, index = plan_collection(rows, inner, effort)
    server = Server(config.uri or str(folder / LITE_FILE), config.milvus_token_file)
    return plan, new_collection(folder, server, config.collection, (plan, index), contract)


def _check_columns(path: str, id_column: str | None) -> None:
    """Report what is wrong with the kept columns before anything is built."""
    if id_column is not None:
        next(iter_embeddings(path, [id_column]))
    if ROW in next(iter_embeddings(path)).columns:
        raise DataError(f"{path}: the name of its column {ROW} is the index's own; give it another in output_columns")


def _words_column(config: IndexConfig, made_by: Mapping[str, Any]) -> str:
    """The column that BM25 reads. Reports one that is not kept before anything is built."""
    kept = list(next(iter_embeddings(config.embedding_path)).columns)
    return text_column(config.embedding_path, kept, Provenance.of(made_by).description_column, config.text_column)


def _advice(config: IndexConfig, made_by: Mapping[str, Any]) -> Advice:
    """What searches do after the vectors, as evaluation recommends; an index without BM25 fuses nothing."""
    sha256 = Provenance.of(made_by).sha256 or (identify(config.model_name).sha256 if config.model_name else None)
    found = read_advice(config.evaluation_dir, sha256)
    return found if config.hybrid else replace(found, fusion=None)


def _real_queries(config: IndexConfig, made_by: Mapping[str, Any], dim: int) -> Vectors | None:
    """Vectors of the user's queries, of a sample if there are many."""
    if config.queries_path is None:
        return None
    texts = read_queries(Path(config.queries_path), config.query_column)
    texts = [texts[i] for i in sample_rows(len(texts), config.measure_queries, config.seed)]
    spec = query_spec(
        made_by,
        dim,
        config.model_name,
        query_prompt=config.query_prompt,
        trust_remote_code=config.trust_remote_code,
        on_changed_vectors=config.on_changed_vectors,
    )
    return query_encoder(spec, Provenance.of(made_by), dim, str(config.embedding_path)).encode(texts, show_bar=True)


def _measure(built: Built, plan: Plan, target: float) -> tuple[list[Point], Point]:
    """Measure settings and choose one; if none reaches the target, log the kinds that do."""
    points, chosen = sweep(built.index, built.truth, plan, target)
    if chosen.recall < target:
        is_faiss = not isinstance(built.index, Collection)
        better = remedies(built.index, built.truth, plan, target) if is_faiss else [(f"{KIND}:Flat", 1.0)]
        logger.warning(
            "召回不足: recall@10 %.4f is the best that %s gives here, target_recall is %.4f; "
            "以下 kind 实测可达到 (measured to reach it): %s",
            chosen.recall, plan.factory, target, ", ".join(f"{kind} ({recall:.4f})" for kind, recall in better),
        )  # fmt: skip
    return points, chosen


def _result(config: IndexConfig, plan: Plan, built: Built, points: list[Point], chosen: Point) -> IndexResult:
    vectors, size = built.index.ntotal, built.bytes / built.index.ntotal
    queries = "real queries" if config.queries_path else "vectors of the index, themselves left out"
    count = f"{built.rows:,}" + (f" rows, {vectors:,} vectors" if vectors < built.rows else "")
    title = (
        f"{plan.factory}, {count} × {built.index.d}: {size:,.0f} bytes per vector, built in {built.seconds:.1f} s; "
        f"{len(built.truth.queries)} {queries}"
    )
    columns = ("chosen", plan.knob or "compared", "recall@10", "p50 ms", "p95 ms", "p99 ms", "queries/s (batch)")
    rows = [
        ("→" if p is chosen else "", p.setting if plan.knob else "all", p.recall, p.p50, p.p95, p.p99, p.qps)
        for p in points
    ]
    return IndexResult(
        folder=Path(config.output_dir),
        kind=plan.factory,
        why=plan.why,
        rows=built.rows,
        dimension=built.index.d,
        build_seconds=built.seconds,
        bytes_per_vector=size,
        points=tuple(points),
        chosen=chosen,
        knob=plan.knob,
        measured_on=queries,
        tables={"settings": make_table(title, columns, rows)},
    )


def _contract(config: IndexConfig, made_by: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """Which model made the vectors and how, their dimension, and the column of ids."""
    maker = Provenance.of(made_by)
    names = ("max_seq_length", "prompt", "precision", "description_column")
    return {
        "model": (made_by.get("model") or {}) | ({"asked_for": config.model_name} if config.model_name else {}),
        "settings": {name: getattr(maker, name) for name in names} | {"model files": list(maker.files)},
        "dimension": dim,
        "id_column": config.id_column,
    }


def _manifest(config: IndexConfig, contract: dict[str, Any], result: IndexResult, built: Built) -> dict[str, Any]:
    return {
        "index_bytes": built.bytes,
        "vectors": int(built.index.ntotal),
        "kind": result.kind,
        "why": result.why,
        "metric": "inner product of unit vectors",
        "rows": result.rows,
        "search": {"knob": result.knob, "setting": result.chosen.setting, "target_recall": config.target_recall},
        "measured": {
            "queries": result.measured_on,
            "points": [asdict(point) for point in result.points],
            "build_seconds": result.build_seconds,
            "bytes_per_vector": result.bytes_per_vector,
        },
        "embedding_path": config.embedding_path,
        **contract,
    }
