"""Fill a Milvus collection from an embedding file, append to it, delete from it.

A build fills a collection of its own, whose name is that of the config with random letters after it; only when it is
complete and measured does the alias, the name of the config, point to it, and the one before is dropped. A state file
in the index folder says which change is under way and how far it is: the same call continues there.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.embeddings.base import Embeddings
from ebr_lib.data.embeddings.files import files_of, iter_embeddings
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.files import write_json
from ebr_lib.index import store
from ebr_lib.index.after import words_column
from ebr_lib.index.build import (
    HNSW_ROWS,
    MANIFEST_SAYS,
    Built,
    need_vectors,
    plan_index,
    vector_batches,
    write_bm25,
    writing_rows,
)
from ebr_lib.index.faiss_tools import Plan
from ebr_lib.index.measure import exact_neighbours
from ebr_lib.index.milvus import (
    CONTRACT,
    KIND,
    LONG_SECONDS,
    MOST_VALUES,
    SAME,
    VECTOR,
    Entities,
    MilvusIndex,
    Server,
    fields_of,
    in_rows,
    said,
)
from ebr_lib.index.store import ROW
from ebr_lib.logs import logger
from ebr_lib.metrics import unit

LONGEST = 65_535  # bytes of a text field
REQUEST_BYTES = 8 << 20  # Milvus takes 64 MB at once by default
MEASURED_AT_ONCE = 100  # queries


def kind_in(kind: str) -> str | None:
    """The kind of index in Milvus that `milvus` or `milvus:HNSW32` asks for; None for an index of Faiss."""
    engine, _, inner = kind.partition(":")
    return (inner or "auto") if engine == KIND else None


def plan_collection(rows: int, kind: str, ef_construction: int) -> tuple[Plan, tuple[str, dict[str, int]]]:
    """Plan a collection, and Milvus's name and parameters of its index.

    :param kind: a factory string, or auto: Milvus splits rows into segments, so a graph is right at any size.
    :raises ConfigError: Milvus has no such index, or Milvus Lite does not.
    """
    plan = plan_index(min(rows, HNSW_ROWS), 0, kind)
    index = _index_of(plan.factory, ef_construction)
    return Plan(f"{KIND}:{plan.factory}", plan.why, plan.knob), index


def _index_of(factory: str, ef_construction: int) -> tuple[str, dict[str, int]]:
    if factory == "Flat":
        return "FLAT", {}
    if found := re.fullmatch(r"HNSW(\d+)", factory):
        return "HNSW", {"M": int(found[1]), "efConstruction": ef_construction}
    if found := re.fullmatch(r"IVF(\d+),(Flat|SQ8)", factory):
        return f"IVF_{found[2].upper()}", {"nlist": int(found[1])}
    raise ConfigError(
        f"kind milvus:{factory}: wanted milvus, milvus:Flat, milvus:HNSW32, milvus:IVF1024,Flat or milvus:IVF1024,SQ8"
    )


# --- rows on their way --------------------------------------------------------------------------------------------


def begin(place: Path, path: str, **about: Any) -> dict[str, Any]:
    """The state of an upload: the interrupted one's if it was of the same file, else a new one.

    :param about: what else must be the same.
    """
    files = [file for given in files_of(path) for file in (sorted(given.iterdir()) if given.is_dir() else [given])]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    wanted = json.loads(json.dumps({"path": path, "files": stats, **about}))
    found = store.read_state(place) or {}
    if wanted.items() <= found.items():
        logger.info("继续上次的上传 continuing an upload: %d 行 rows have arrived", found["done"])
        return found
    return {**wanted, "first": 0, "done": 0}


def sent(
    held: Entities, place: Path, state: dict[str, Any], batches: Iterable[Embeddings]
) -> Iterator[tuple[Embeddings, Vectors]]:
    """Send batches and yield each with its unit vectors; rows that the state lists as arrived are not sent again.

    :param state: of the upload; `place` is its file.
    """
    seen = 0
    for batch in batches:
        vectors = unit(batch.vectors) if len(batch) else batch.vectors
        texts = sum(len(text or "") for values in batch.columns.values() for text in values)
        each = max(1, int(REQUEST_BYTES / (4 * vectors.shape[1] + 3 * texts / max(len(batch), 1) + 100)))
        for start in range(0, len(batch), each):
            rows = range(start, min(start + each, len(batch)))
            seen += len(rows)
            if seen > state["done"]:
                entities = [_entity(held, state, batch, i) | {VECTOR: vectors[i]} for i in rows]
                for entity, digest in zip(entities, store.digests_of(vectors[rows]), strict=True):
                    entity[SAME] = digest.hex()
                state["next"] = entities[-1][ROW] + 1
                write_json(place, state)  # before the first row is sent, and not if it cannot be
                held.server.call("upsert", held.name, entities)
                state["done"] = seen
                write_json(place, state)
        yield batch, vectors


def _entity(held: Entities, state: Mapping[str, Any], batch: Embeddings, i: int) -> dict[str, Any]:
    """The number and the texts of a row of a batch.

    :raises DataError: Milvus cannot hold them.
    """
    row, texts = int(batch.rows[i]), {name: batch.columns[name][i] for name in held.fields}
    if held.id_column is not None and texts[held.id_column] is None:
        raise DataError(f"{state['path']}: row {row} has no id (column {held.id_column}); give every row one")
    for name, text in texts.items():
        if (size := len((text or "").encode())) > LONGEST:
            raise DataError(
                f"{state['path']}: row {row}: {name} holds {size:,} bytes, and Milvus's texts {LONGEST:,} at most; "
                "shorten it, or leave the column out of output_columns"
            )
    return {ROW: state["first"] + row} | {held.fields[name]: text for name, text in texts.items()}


# --- a build ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Collection(Entities):
    """A collection that a build fills, measured like an index of Faiss: rows are numbered in their order.

    :ivar alias: name under which it is found when it is complete.
    :ivar contract: model, settings, dimension and ids, as the index's manifest has them.
    :ivar before: the collection that it replaces.
    :ivar d: dimensions; `cells` are those of each segment, 0 for other kinds.
    """

    folder: Path
    alias: str
    plan: Plan
    index: tuple[str, dict[str, int]]
    contract: dict[str, Any]
    before: str | None
    d: int
    cells: int
    rows: Ints = field(default_factory=lambda: store.NO_ROWS)
    is_trained = True

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def search(self, queries: Vectors, k: int, params: Any = None) -> tuple[Vectors, Ints]:
        """The k nearest rows of each query, as Faiss gives them: scores and ids, -1 where there are fewer.

        :param params: Faiss's parameters for the setting of the knob.
        """
        setting = self.plan.knob, getattr(params, "efSearch", getattr(params, "nprobe", 0))
        scores, ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for start in range(0, len(queries), MEASURED_AT_ONCE):
            for i, hits in enumerate(self.nearest(queries[start : start + MEASURED_AT_ONCE], k, setting), start):
                scores[i, : len(hits)] = [hit["distance"] for hit in hits]
                ids[i, : len(hits)] = np.searchsorted(self.rows, [hit[ROW] for hit in hits])
        return scores, ids

    def reconstruct_batch(self, ids: Ints) -> Vectors:
        """Vectors of rows."""
        return np.array(self.of_rows(self.rows[ids], VECTOR), np.float32)

    # --- filling --------------------------------------------------------------------------------------------------

    def begin(self, path: str, place: Path) -> dict[str, Any]:
        """The state of the interrupted upload of the same file, or of a new one into a new collection.

        :param place: file of the state.
        """
        columns = list(next(iter_embeddings(path)).columns)
        about = {"uri": self.server.uri, "alias": self.alias, "index": self.index, "columns": columns}
        state = begin(place, path, **about, contract=self.contract, replaces=self.before)
        if "collection" not in state:
            old = store.read_state(place) or {}  # complete, or to be replaced
            self._drop({old.get("collection"), old.get("replaces")} - {self.before})
            state["collection"] = f"{self.alias}_{secrets.token_hex(4)}"
            write_json(place, state)
        self.name, self.fields = state["collection"], fields_of(columns)
        if self.server.describe(self.name) is None:
            state["done"] = 0
            self._create()
        return state

    def _create(self) -> None:
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(ROW, DataType.INT64, is_primary=self.id_column is None)
        schema.add_field(SAME, DataType.VARCHAR, max_length=2 * store.DIGEST)
        schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=self.d)
        for name, place in self.fields.items():
            kind = {"is_primary": True} if name == self.id_column else {"nullable": True}
            schema.add_field(place, DataType.VARCHAR, max_length=LONGEST, **kind)
        self.server.call(
            "create_collection", self.name, schema=schema, consistency_level="Session",
            properties={CONTRACT: json.dumps(self.contract, ensure_ascii=False)},
        )  # fmt: skip

    def make_searchable(self) -> None:
        """Index the rows and load them."""
        from pymilvus import MilvusClient

        self.server.call("flush", self.name, seconds=LONG_SECONDS)
        if not self.server.call("list_indexes", self.name):
            index = MilvusClient.prepare_index_params()
            kind, params = self.index
            nested = {"params": params}  # as servers take them; Milvus Lite ignores them where pymilvus unpacks them
            index.add_index(VECTOR, index_type=kind, index_name=VECTOR, metric_type="IP", params=nested)
            self.server.call("create_index", self.name, index, sync=False)
        while self.server.call("describe_index", self.name, VECTOR).get("pending_index_rows", 0):
            time.sleep(0.5)
        self.server.call("load_collection", self.name, seconds=LONG_SECONDS)

    def check_complete(self, path: str) -> None:
        """Check that Milvus holds every row.

        :raises DataError: it does not, which means that ids occur twice.
        """
        if (missing := self.ntotal - self.count()) == 0:
            return
        self._drop({self.name})
        (self.folder / store.UPLOAD_FILE).unlink()
        why = (
            f"have the id of another row (column {self.id_column}), and Milvus keeps one row per id; give a column of "
            "unique ids as id_column, or none"
        )
        raise DataError(f"{path}: {missing:,} rows {why if self.id_column else 'did not arrive; build it again'}")

    def publish(self, uri: str | None, token_file: str | None) -> dict[str, Any]:
        """Let the alias point to it; returns what a manifest says of it beside the contract."""
        method = "alter_alias" if self.server.describe(self.alias) else "create_alias"
        self.server.call(method, self.name, self.alias)
        about = {"uri": uri, "token_file": token_file, "collection": self.alias, "holds": self.name}
        return {KIND: about | {"fields": self.fields}, "next_row": int(self.rows[-1]) + 1}

    def finish(self) -> None:
        """Drop the collection that it replaces; the manifest names this one now."""
        self._drop({self.before})
        for name in store.STATE_FILES:
            (self.folder / name).unlink(missing_ok=True)
        self.server.close()

    def _drop(self, names: set[str | None]) -> None:
        for name in names - {None}:
            self.server.call("drop_collection", name)  # also if there is none


def new_collection(
    folder: Path, server: Server, alias: str, planned: tuple[Plan, tuple[str, dict[str, int]]], contract: dict[str, Any]
) -> Collection:
    """A collection to fill, once it is sure that its name is free or this folder's.

    :raises ConfigError: another collection has the name.
    """
    held = store.read_manifest(folder) if (folder / store.MANIFEST_FILE).is_file() else {}
    before = held[KIND]["holds"] if KIND in held else None
    begun = store.read_state(folder / store.UPLOAD_FILE) or {}
    if (found := server.describe(alias)) and found["collection_name"] not in (before, begun.get("collection")):
        raise ConfigError(
            f"Milvus at {server.uri} has a collection {alias} that is not from {folder}: {said(found)}; "
            "give another name as collection, or drop that one first"
        )
    plan, index = planned
    return Collection(
        server=server, id_column=contract["id_column"], folder=folder, alias=alias, plan=plan, index=index,
        contract=contract, before=before, d=contract["dimension"], cells=index[1].get("nlist", 0),
    )  # fmt: skip


def build_collection(
    path: str, collection: Collection, folder: Path, *, words: str | None, sample: Ints, queries: Vectors | None
) -> Built:
    """Fill a collection from an embedding file, and find exact neighbours to measure it with.

    :param folder: gets the texts of the column `words`, which BM25 reads.
    :param sample: rows whose vectors are the queries to measure with, if `queries` is None.
    :raises DataError: an id is missing or not unique, a text is too long, or Milvus is not reached any more.
    """
    from tqdm.auto import tqdm

    start, place = time.perf_counter(), collection.folder / store.UPLOAD_FILE
    state = collection.begin(path, place)
    numbers, taken, done = [collection.rows], [np.empty((0, collection.d), np.float32)], 0
    batches = tqdm(vector_batches(path, None, collection.d, MANIFEST_SAYS), desc="上传 Milvus", delay=2, leave=False)
    with writing_rows(folder / store.ROWS_FILE, [words] if words else None) as write:
        for batch, vectors in sent(collection, place, state, batches):
            low, high = np.searchsorted(sample, (done, done + len(batch)))
            taken.append(vectors[sample[low:high] - done].reshape(-1, collection.d))
            numbers.append(batch.rows)
            write(batch, 0)
            done += len(batch)
    collection.rows = np.concatenate(numbers)
    need_vectors(path, collection.ntotal)
    collection.make_searchable()
    collection.check_complete(path)
    seconds = time.perf_counter() - start
    asked, own = (np.concatenate(taken), sample) if queries is None else (queries, np.full(len(queries), -1))
    every = (unit(batch.vectors) for batch in iter_embeddings(path, ()) if len(batch))
    truth = exact_neighbours(None, every, asked, own[: len(asked)])
    kind, params = collection.index
    size = collection.d * (1 if kind == "IVF_SQ8" else 4) + 8 * params.get("M", 0)  # computed; Milvus does not say
    return Built(collection, size * collection.ntotal, seconds, truth, collection.ntotal)


# --- changes ------------------------------------------------------------------------------------------------------


def append(held: MilvusIndex, path: str) -> int:
    """Upsert the rows of an embedding file; returns how many rows there are then. Rows with an id that is there
    replace it. After an interruption the same call continues; if the file has changed since, it begins again, and takes
    out the rows that only the earlier file had.

    :raises DataError: see `build_collection`; or rows of another file have arrived only in part.
    """
    if held.begun(store.DELETE_FILE):
        delete(held, [], ROW)
    place, old = held.folder / store.APPEND_FILE, held.begun(store.APPEND_FILE)
    if old and old["path"] != path:
        raise DataError(
            f"index {held.folder}: the rows of {old['path']} have arrived only in part; add that file again first, or "
            "build the index again"
        )
    state, own = begin(place, path, **held.state), held.manifest["next_row"]
    if "next" not in state:
        state["first"] = state["next"] = old["next"] if old else own
    words = words_column(held.manifest)
    texts = store.read_rows(store.place_of(held.folder, store.ROWS_FILE)).to_batches() if words else ()
    with store.changed_together(held.folder) as new:
        with writing_rows(new / store.ROWS_FILE, [words] if words else None, texts) as write:
            for batch, _ in sent(held, place, state, vector_batches(path, held.columns, held.dim, "the index")):
                write(batch, state["first"])
        if state["first"] > own:
            _take_out(held, f"{ROW} >= {own} and {ROW} < {state['first']}")
        if words and held.bm25 is not None:
            write_bm25(new, held.bm25, words)
        before, rows = held.manifest["rows"], save_count(held, new, next_row=state["next"])
    place.unlink(missing_ok=True)
    if replaced := before + state["done"] - rows:
        logger.info("已替换 replaced: %d rows whose ids were there", replaced)
    return rows


def _take_out(held: MilvusIndex, earlier: str) -> None:
    """Delete the rows that only an earlier version of an added file had."""
    place = held.fields.get(held.id_column or "", ROW)
    if found := [str(entity[place]) for entity in held.query(earlier, [ROW, place])]:
        held.server.call("delete", held.name, filter=earlier)
        logger.warning(
            "已撤回 taken out again: %d rows that the file had before it changed, and rows they had replaced (%s …)",
            len(found), ", ".join(found[:5]),
        )  # fmt: skip


def delete(held: MilvusIndex, ids: Sequence[str], column: str) -> int:
    """Delete the rows that hold one of the ids, and those of an interrupted deletion; returns how many are left.

    :raises DataError: no row has an id, or the column is not kept.
    """
    place, asked = held.folder / store.DELETE_FILE, [column, *ids]
    begun = held.begun(store.DELETE_FILE) or {"asked": None, "rows": []}
    new = [] if begun["asked"] == asked else held.numbers_of(ids, column).tolist()
    rows = np.array(begun["rows"] + new, np.int64)
    write_json(place, held.state | {"asked": asked, "rows": rows.tolist()})
    for start in range(0, len(rows), MOST_VALUES):
        held.server.call("delete", held.name, filter=in_rows(rows[start : start + MOST_VALUES]))
    left = save_count(held, held.folder)
    place.unlink()
    return left


def save_count(held: MilvusIndex, folder: Path, **more: int) -> int:
    """Write a manifest that says how many rows there are; the next search then opens the index again."""
    rows = held.count()
    size = held.manifest["index_bytes"] // max(held.manifest["rows"], 1) * rows
    counts = {"rows": rows, "vectors": rows, "index_bytes": size}
    write_json(folder / store.MANIFEST_FILE, held.manifest | counts | more)
    return rows
