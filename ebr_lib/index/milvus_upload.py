"""Fill a Milvus collection from an embedding file, append to it, delete from it.

A build fills a collection of its own, whose name is that of the config with random letters after it; only when it is
complete and measured does the alias, the name of the config, point to it, and the one before is dropped. A state file
in the index folder says which file is on its way into which collection, and how many rows have arrived: the same call
continues there.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
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
from ebr_lib.index.build import HNSW_ROWS, MANIFEST_SAYS, Built, need_vectors, plan_index, vector_batches
from ebr_lib.index.faiss_tools import Plan
from ebr_lib.index.measure import exact_neighbours
from ebr_lib.index.milvus import (
    CONTRACT,
    KIND,
    LONG_SECONDS,
    MOST_VALUES,
    SAME,
    VECTOR,
    MilvusIndex,
    Server,
    fields_of,
    in_rows,
    read_contract,
    said,
    search_setting,
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


@dataclass
class Upload:
    """Rows on their way into a collection: batches that a state file lists as arrived are not sent again."""

    server: Server
    collection: str
    fields: Mapping[str, str]
    id_column: str | None
    path: str
    place: Path
    state: dict[str, Any]
    seen: int = 0

    def add(self, batch: Embeddings, first_row: int) -> Vectors:
        """Send a batch; returns its unit vectors."""
        vectors = unit(batch.vectors) if len(batch) else batch.vectors
        for part in _parts(batch, vectors.shape[1]):
            self.seen += part.stop - part.start
            if self.seen > self.state["done"]:
                entities = list(self._entities(batch, vectors, part, first_row))
                write_json(self.place, self.state)  # before the first row is sent, and not if it cannot be
                self.server.call("upsert", self.collection, entities)
                self.state["done"] = self.seen
                write_json(self.place, self.state)
        return vectors

    def _entities(self, batch: Embeddings, vectors: Vectors, part: slice, first_row: int) -> Iterator[dict[str, Any]]:
        for i in range(part.start, part.stop):
            row = int(batch.rows[i])
            texts = {self.fields[name]: batch.columns[name][i] for name in self.fields}
            self._check(texts, row)
            digest = hashlib.blake2b(vectors[i] + np.float32(0), digest_size=store.DIGEST).hexdigest()
            yield {ROW: row + first_row, SAME: digest, VECTOR: vectors[i], **texts}

    def _check(self, texts: Mapping[str, str | None], row: int) -> None:
        if self.id_column is not None and texts[self.fields[self.id_column]] is None:
            raise DataError(f"{self.path}: row {row} has no id (column {self.id_column}); give every row one")
        for name, place in self.fields.items():
            if (size := len((texts[place] or "").encode())) > LONGEST:
                raise DataError(
                    f"{self.path}: row {row}: {name} holds {size:,} bytes, and Milvus's texts {LONGEST:,} at most; "
                    "shorten it, or leave the column out of output_columns"
                )


def flush(server: Server, collection: str) -> None:
    """Let Milvus write what arrived to its storage, and index it."""
    server.call("flush", collection, seconds=LONG_SECONDS)
    while server.call("list_indexes", collection) and _not_indexed(server, collection):
        time.sleep(0.5)


def _not_indexed(server: Server, collection: str) -> int:
    return int(server.call("describe_index", collection, VECTOR).get("pending_index_rows", 0))


def _parts(batch: Embeddings, dim: int) -> Iterator[slice]:
    """Parts of a batch, each a request of some megabytes."""
    texts = sum(len(text or "") for values in batch.columns.values() for text in values)
    each = max(1, int(REQUEST_BYTES / (4 * dim + 3 * texts / max(len(batch), 1) + 100)))
    return (slice(start, min(start + each, len(batch))) for start in range(0, len(batch), each))


def begin(place: Path, path: str, **about: Any) -> dict[str, Any]:
    """The state of an upload: the interrupted one's if it was of the same file, else a new one.

    :param about: what else must be the same.
    """
    files = [file for given in files_of(path) for file in (sorted(given.iterdir()) if given.is_dir() else [given])]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    wanted = json.loads(json.dumps({"path": path, "files": stats, **about}))
    if (found := read_state(place)) and {name: found.get(name) for name in wanted} == wanted:
        logger.info("继续上次的上传 continuing an upload: %d 行 rows have arrived", found["done"])
        return found
    return {**wanted, "done": 0}


def read_state(place: Path) -> dict[str, Any] | None:
    """A state file; None if there is none."""
    return dict(json.loads(place.read_text(encoding="utf-8"))) if place.is_file() else None


# --- a build ------------------------------------------------------------------------------------------------------


@dataclass
class Collection:
    """A collection that a build fills, measured like an index of Faiss: rows are numbered in their order.

    :ivar alias: name under which it is found when it is complete.
    :ivar contract: model, settings, dimension and ids, as the index's manifest has them.
    :ivar before: the collection that it replaces.
    """

    server: Server
    folder: Path
    alias: str
    plan: Plan
    index: tuple[str, dict[str, int]]
    contract: dict[str, Any]
    before: str | None
    state: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    rows: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    is_trained = True

    @property
    def d(self) -> int:
        """Dimensions."""
        return int(self.contract["dimension"])

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def cells(self) -> int:
        """Cells of each of its segments, 0 for other kinds."""
        return self.index[1].get("nlist", 0)

    @property
    def bytes_each(self) -> int:
        """Bytes per row of vectors and graph, computed; Milvus does not say."""
        kind, params = self.index
        return self.d * (1 if kind == "IVF_SQ8" else 4) + 8 * params.get("M", 0)

    @property
    def name(self) -> str:
        """The collection."""
        return str(self.state["collection"])

    def search(self, queries: Vectors, k: int, params: Any = None) -> tuple[Vectors, Ints]:
        """The k nearest rows of each query, as Faiss gives them: scores and ids, -1 where there are fewer.

        :param params: Faiss's parameters for the setting of the knob.
        """
        setting = getattr(params, "efSearch", getattr(params, "nprobe", 0))
        arguments: dict[str, Any] = {"anns_field": VECTOR, "limit": k, "output_fields": [ROW]}
        arguments["search_params"] = {"metric_type": "IP", "params": search_setting(self.plan.knob, setting, k)}
        scores, ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for start in range(0, len(queries), MEASURED_AT_ONCE):
            data = queries[start : start + MEASURED_AT_ONCE].tolist()
            for i, hits in enumerate(self.server.call("search", self.name, data=data, **arguments), start):
                scores[i, : len(hits)] = [hit["distance"] for hit in hits]
                ids[i, : len(hits)] = np.searchsorted(self.rows, [hit["entity"][ROW] for hit in hits])
        return scores, ids

    def reconstruct_batch(self, ids: Ints) -> Vectors:
        """Vectors of rows."""
        expression = in_rows(np.unique(self.rows[ids]))
        found = self.server.call("query", self.name, filter=expression, output_fields=[ROW, VECTOR])
        held = {entity[ROW]: entity[VECTOR] for entity in found}
        return np.array([held[row] for row in self.rows[ids].tolist()], np.float32)

    # --- filling --------------------------------------------------------------------------------------------------

    def begin(self, path: str) -> Upload:
        """Continue the interrupted upload of the same file, or create a collection for it."""
        place, old = self.folder / store.UPLOAD_FILE, read_state(self.folder / store.UPLOAD_FILE)
        if old and old["collection"] == self.before:  # it was complete
            self._drop(old["replaces"])
            place.unlink()
        columns = list(next(iter_embeddings(path)).columns)
        self.fields = fields_of(columns)
        about = {"uri": self.server.uri, "alias": self.alias, "index": self.index, "columns": columns}
        self.state = begin(place, path, **about, contract=self.contract)
        if "collection" not in self.state:
            if old := read_state(place):
                self._drop(old["collection"])
            self.state |= {"collection": f"{self.alias}_{secrets.token_hex(4)}", "replaces": self.before}
            write_json(place, self.state)
        if self.server.describe(self.name) is None:
            self.state["done"] = 0
            self._create()
        return Upload(self.server, self.name, self.fields, self.contract["id_column"], path, place, self.state)

    def _create(self) -> None:
        from pymilvus import DataType, MilvusClient

        ids = self.contract["id_column"]
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(ROW, DataType.INT64, is_primary=ids is None)
        schema.add_field(SAME, DataType.VARCHAR, max_length=2 * store.DIGEST)
        schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=self.d)
        for name, place in self.fields.items():
            kind = {"is_primary": True} if name == ids else {"nullable": True}
            schema.add_field(place, DataType.VARCHAR, max_length=LONGEST, **kind)
        self.server.call(
            "create_collection", self.name, schema=schema, consistency_level="Session",
            properties={CONTRACT: json.dumps(self.contract, ensure_ascii=False)},
        )  # fmt: skip

    def make_searchable(self) -> None:
        """Index the rows and load them."""
        from pymilvus import MilvusClient

        flush(self.server, self.name)
        if not self.server.call("list_indexes", self.name):
            index = MilvusClient.prepare_index_params()
            kind, params = self.index
            nested = {"params": params}  # as servers take them; Milvus Lite ignores them where pymilvus unpacks them
            index.add_index(VECTOR, index_type=kind, index_name=VECTOR, metric_type="IP", params=nested)
            self.server.call("create_index", self.name, index, sync=False)
        flush(self.server, self.name)
        self.server.call("load_collection", self.name, seconds=LONG_SECONDS)

    def check_complete(self, path: str) -> None:
        """Check that Milvus holds every row.

        :raises DataError: it does not, which means that ids occur twice.
        """
        if (missing := self.ntotal - self.server.count(self.name)) == 0:
            return
        self._drop(self.name)
        (self.folder / store.UPLOAD_FILE).unlink()
        if ids := self.contract["id_column"]:
            raise DataError(
                f"{path}: {missing:,} rows have the id of another row (column {ids}), and Milvus keeps one row per id; "
                "give a column of unique ids as id_column, or none"
            )
        raise DataError(f"{path}: {missing:,} of {self.ntotal:,} rows did not arrive in {self.name}; build it again")

    def publish(self, uri: str | None, token_file: str | None) -> dict[str, Any]:
        """Let the alias point to it; returns what a manifest says of it beside the contract."""
        method = "alter_alias" if self.server.describe(self.alias) else "create_alias"
        self.server.call(method, self.name, self.alias)
        about = {"uri": uri, "token_file": token_file, "collection": self.alias, "holds": self.name}
        return {KIND: about | {"fields": self.fields}, "next_row": int(self.rows[-1]) + 1}

    def finish(self) -> None:
        """Drop the collection that it replaces; the manifest names this one now."""
        self._drop(self.before)
        for name in (store.UPLOAD_FILE, store.APPEND_FILE):
            (self.folder / name).unlink(missing_ok=True)
        self.server.close()

    def _drop(self, name: str | None) -> None:
        if name and self.server.describe(name):
            self.server.call("drop_collection", name)


def new_collection(
    folder: Path, server: Server, alias: str, planned: tuple[Plan, tuple[str, dict[str, int]]], contract: dict[str, Any]
) -> Collection:
    """A collection to fill, once it is sure that its name is free or this folder's.

    :raises ConfigError: another collection has the name.
    """
    held = store.read_manifest(folder) if (folder / store.MANIFEST_FILE).is_file() else {}
    before = held[KIND]["holds"] if KIND in held else None
    begun = read_state(folder / store.UPLOAD_FILE) or {}
    if (found := server.describe(alias)) and found["collection_name"] not in (before, begun.get("collection")):
        raise ConfigError(
            f"Milvus at {server.uri} has a collection {alias} that is not from {folder}: {said(read_contract(found))}; "
            "give another name as collection, or drop that one first"
        )
    return Collection(server, folder, alias, *planned, contract, before)


def build_collection(path: str, collection: Collection, sample: Ints, queries: Vectors | None) -> Built:
    """Fill a collection from an embedding file, and find exact neighbours to measure it with.

    :param sample: rows whose vectors are the queries to measure with, if `queries` is None.
    :raises DataError: an id is missing or not unique, a text is too long, or Milvus is not reached any more.
    """
    from tqdm.auto import tqdm

    start, upload = time.perf_counter(), collection.begin(path)
    numbers, taken = [collection.rows], [np.empty((0, collection.d), np.float32)]
    for batch in tqdm(
        vector_batches(path, None, collection.d, MANIFEST_SAYS), desc="上传 Milvus", delay=2, leave=False
    ):
        vectors, done = upload.add(batch, 0), sum(map(len, numbers))
        low, high = np.searchsorted(sample, (done, done + len(batch)))
        taken.append(vectors[sample[low:high] - done].reshape(-1, collection.d))
        numbers.append(batch.rows)
    collection.rows = np.concatenate(numbers)
    need_vectors(path, collection.ntotal)
    collection.make_searchable()
    collection.check_complete(path)
    seconds = time.perf_counter() - start
    asked, own = (np.concatenate(taken), sample) if queries is None else (queries, np.full(len(queries), -1))
    every = (unit(batch.vectors) for batch in iter_embeddings(path, ()) if len(batch))
    truth = exact_neighbours(None, every, asked, own[: len(asked)])
    return Built(collection, collection.bytes_each * collection.ntotal, seconds, truth, collection.ntotal)


# --- changes ------------------------------------------------------------------------------------------------------


def append(held: MilvusIndex, embedding_path: str) -> int:
    """Upsert the rows of an embedding file; returns how many rows there are then. Rows with an id that is there
    replace it.

    :raises DataError: see `build_collection`; or rows of another file have arrived only in part.
    """
    place, first = held.folder / store.APPEND_FILE, int(held.manifest["next_row"])
    state = begin(place, embedding_path, collection=held.name, first_row=first)
    if "before" not in state:
        if old := read_state(place):
            raise DataError(
                f"index {held.folder}: the rows of {old['path']} have arrived only in part; add that file again first, "
                "or build the index again"
            )
        state["before"] = len(held)
    upload = Upload(held.server, held.name, held.fields, held.manifest["id_column"], embedding_path, place, state)
    for batch in vector_batches(embedding_path, held.columns, held.dim, "the index"):
        upload.add(batch, first)
        held.manifest["next_row"] = max(held.manifest["next_row"], first + int(batch.rows.max(initial=-1)) + 1)
    flush(held.server, held.name)
    if replaced := state["before"] + upload.seen - save_count(held):
        logger.info("已替换 replaced: %d rows whose ids were there", replaced)
    place.unlink(missing_ok=True)
    return int(held.manifest["rows"])


def delete(held: MilvusIndex, ids: Sequence[str], column: str) -> int:
    """Delete the rows that hold one of the ids; returns how many are left.

    :raises DataError: no row has an id, or the column is not kept.
    """
    rows = held.numbers_of(ids, column)
    for start in range(0, len(rows), MOST_VALUES):
        held.server.call("delete", held.name, filter=in_rows(rows[start : start + MOST_VALUES]))
    return save_count(held)


def save_count(held: MilvusIndex) -> int:
    """Write how many rows there are to the manifest; the next search then opens the index again."""
    rows = len(held)
    size = held.manifest["index_bytes"] // max(held.manifest["rows"], 1) * rows
    held.manifest |= {"rows": rows, "vectors": rows, "index_bytes": size}
    write_json(held.folder / store.MANIFEST_FILE, held.manifest)
    return rows
