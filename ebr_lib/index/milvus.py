"""A Milvus collection, searched as an opened index is.

An entity is a row of the embedding file: its number (`_row`), a digest of its vector (`_same`; equal vectors share it),
the unit vector (`vector`), and a text field per kept column. The contract, which model made the vectors and how, is a
property of the collection; opening compares it with the manifest of the index folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.bm25 import Bm25
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.extras import require
from ebr_lib.files import read_token
from ebr_lib.index import store
from ebr_lib.index.after import POOL, VECTORS_ALONE, After, Found, best_places, ordered, words_column
from ebr_lib.index.store import NO_ROWS, ROW
from ebr_lib.logs import logger
from ebr_lib.metrics import unit
from ebr_lib.model.provenance import Provenance

KIND = "milvus"
SAME, VECTOR = "_same", "vector"  # fields, beside ROW
CONTRACT = "ebr.contract"  # property of a collection
MOST_ROWS = 16_384  # that Milvus returns for one search
MOST_VALUES = 1000  # in one expression
SPARE = 32  # rows to ask for beyond k, so that those which tie with the k-th are among them
TIE = 1e-6
CONNECT_SECONDS, CALL_SECONDS = 10.0, 60.0
LONG_SECONDS = 3600.0  # for one call that writes, indexes or loads a whole collection
LOST_SECONDS = 60.0  # a lost connection is tried for so long
LITE_OPTIONS = {"grpc.keepalive_time_ms": 330_000}  # its server hangs up on whoever pings often
CONNECT_FAILED, NOT_LOADED = 2, 101  # codes of Milvus's errors
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,200}")
RESERVED = {"and", "or", "not", "in", "like", "is", "null", "true", "false", "exists", "vector", "rowid", "timestamp"}


# --- the server ---------------------------------------------------------------------------------------------------


class Server:
    """A connection to Milvus.

    :param uri: `http://host:19530`, or a file of Milvus Lite, whose name ends in .db.
    :param token_file: file with the token; None takes the environment's MILVUS_TOKEN.
    :raises NotInstalledError: pymilvus or milvus-lite is missing.
    :raises ConfigError: nothing answers there, or it is not Milvus.
    """

    def __init__(self, uri: str, token_file: str | None = None) -> None:
        require(KIND)
        import pymilvus

        for name in ("pymilvus", "milvus_lite"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what they would print is in the errors raised here
        self.uri, self._error = uri, pymilvus.MilvusException
        token = read_token(token_file) or os.environ.get("MILVUS_TOKEN", "")
        is_file = uri.endswith(".db")
        try:
            self._client = pymilvus.MilvusClient(
                uri, token=token, timeout=CONNECT_SECONDS, grpc_options=LITE_OPTIONS if is_file else {}
            )
        except (self._error, ValueError, OSError) as error:
            reason = str(getattr(error, "message", error))
            advice = (
                "Milvus Lite opens a file for one process at a time: end the other one, or use a server"
                if is_file
                else "check milvus_uri (such as http://localhost:19530), MILVUS_TOKEN, and that Milvus runs there"
            )
            raise ConfigError(f"no Milvus at {uri} ({reason}); {advice}") from error

    def call(self, method: str, *args: Any, seconds: float = CALL_SECONDS, **arguments: Any) -> Any:
        """Call a method of pymilvus's client; while the connection is lost, again, for `LOST_SECONDS`.

        :param seconds: how long one call may take.
        :raises DataError: Milvus refuses, or the connection stays lost.
        """
        end, pause = None, 0.1
        while True:
            try:
                return getattr(self._client, method)(*args, timeout=seconds, **arguments)
            except self._error as error:
                if error.code == NOT_LOADED and method != "load_collection":  # Milvus Lite loads none when it starts
                    self.call("load_collection", args[0], seconds=LONG_SECONDS)
                    continue
                if not _is_lost(error):
                    raise DataError(f"Milvus at {self.uri} refuses {method}: {error.message}") from error
                end = end or time.monotonic() + LOST_SECONDS  # from now on: the call itself may have taken long
                if time.monotonic() + pause > end:
                    raise DataError(
                        f"the connection to Milvus at {self.uri} is lost ({error.message}); run the same call again "
                        "when it is back: it continues there"
                    ) from error
                logger.info("Milvus 连接中断，重试 connection lost, trying again: %s", self.uri)
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def describe(self, collection: str) -> dict[str, Any] | None:
        """What a collection, or the one an alias stands for, is; None if there is none."""
        return self.call("describe_collection", collection) if self.call("has_collection", collection) else None

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()


def check_milvus(uri: str | None, token_file: str | None) -> None:
    """Check that Milvus is installed, and answers if it is a server."""
    require(KIND)
    if uri:
        Server(uri, token_file).close()


def _is_lost(error: Any) -> bool:
    """Whether the server was not reached: no status of Milvus, but one of the connection."""
    import grpc

    return (
        error.code == CONNECT_FAILED
        or isinstance(error.code, grpc.StatusCode)
        or isinstance(error.__cause__, grpc.RpcError)
    )


# --- fields and expressions ---------------------------------------------------------------------------------------


def fields_of(columns: Sequence[str]) -> dict[str, str]:
    """Kept column to its field: the same name if Milvus allows it (ASCII letters, digits, underscores)."""
    is_plain = {name: PLAIN.fullmatch(name) and name.lower() not in RESERVED for name in columns}
    return {name: name if is_plain[name] else f"_column_{i}" for i, name in enumerate(columns)}


_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def one_of(place: str, values: Sequence[str | None]) -> str:
    """Expression: the field has one of the values; None is null."""
    texts = ", ".join(f'"{value.translate(_ESCAPES)}"' for value in values if value is not None)
    parts = [f"{place} in [{texts}]"] if texts else []
    parts += [f"{place} is null"] if None in values else []
    return f"({' or '.join(parts)})" if parts else f"{ROW} < 0"  # no value allows no row


def in_rows(rows: Ints) -> str:
    """Expression: the row has one of the numbers."""
    return f"{ROW} in {rows.tolist()}"


def read_contract(described: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contract in a collection's properties; None for a collection that was not made here."""
    text = (described.get("properties") or {}).get(CONTRACT)
    return dict(json.loads(text)) if text else None


def said(described: Mapping[str, Any]) -> str:
    """The contract of a collection, for an error."""
    if (contract := read_contract(described)) is None:
        return "it was not made by this stage"
    return f"it holds vectors of {Provenance.of(contract).said}, {contract['dimension']} dimensions"


# --- a collection -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Entities:
    """What is read from a collection.

    :ivar fields: kept column to its field.
    """

    server: Server = field(repr=False)
    id_column: str | None
    name: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    def count(self, expression: str = "") -> int:
        """Number of entities that an expression allows."""
        return int(self.query(expression, ["count(*)"], consistency_level="Strong")[0]["count(*)"])

    def query(self, expression: str, fields: Sequence[str], **arguments: Any) -> list[dict[str, Any]]:
        """Fields of the entities that an expression allows."""
        return list(self.server.call("query", self.name, filter=expression, output_fields=list(fields), **arguments))

    def of_rows(self, rows: Ints, place: str) -> list[Any]:
        """Values of a field, of rows in their order."""
        held = {entity[ROW]: entity[place] for entity in self.query(in_rows(rows), [ROW, place])}
        return [held[row] for row in rows.tolist()]

    def nearest(
        self, queries: Vectors, limit: int, search: tuple[str | None, int], fields: Sequence[str] = (), where: str = ""
    ) -> list[list[dict[str, Any]]]:
        """What Milvus finds for each query, best first: `distance`, `ROW` and fields.

        :param search: the knob, as Faiss names it, and its setting.
        """
        knob, setting = search
        params = {"efSearch": {"ef": max(setting, limit)}, "nprobe": {"nprobe": setting}}.get(knob or "", {})
        found = self.server.call(
            "search", self.name, data=queries.tolist(), anns_field=VECTOR, limit=limit, filter=where,
            output_fields=[ROW, *fields], search_params={"metric_type": "IP", "params": params},
        )  # fmt: skip
        return [[{"distance": hit["distance"], **hit["entity"]} for hit in hits] for hits in found]


@dataclass(kw_only=True)
class MilvusIndex(Entities):
    """An opened index folder whose rows are in Milvus; found, hidden and diverse rows are as in `SearchIndex`.

    :ivar bm25: over the texts of the rows whose numbers are `rows`, if it is kept (`words_column`).
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    dim: int
    bm25: Bm25 | None = field(repr=False)
    rows: Ints = field(repr=False)

    @property
    def columns(self) -> list[str]:
        """Names of the kept columns."""
        return list(self.fields)

    def __len__(self) -> int:
        return self.count()

    @property
    def state(self) -> dict[str, Any]:
        """What a change of this index begins with; another build, or a finished addition, has another."""
        return {"collection": self.name, "next_row": self.manifest["next_row"]}

    def begun(self, file: str) -> dict[str, Any] | None:
        """The state file of a change that has begun and is not finished."""
        found = store.read_state(self.folder / file) or {}
        return found if self.state.items() <= found.items() else None

    @property
    def unfinished(self) -> str:
        """What searches say while a change is under way or was interrupted; empty otherwise."""
        is_begun = any(self.begun(file) for file in (store.APPEND_FILE, store.DELETE_FILE))
        return "修改未完成 a change is not finished: run it again" if is_begun else ""

    def find(
        self,
        query: Vectors,
        k: int,
        where: Mapping[str, Sequence[str | None]],
        *,
        hidden: Ints = NO_ROWS,
        distinct: bool = False,
        diversity: float = 0.0,
        after: After = VECTORS_ALONE,
    ) -> list[tuple[float, dict[str, Any]]]:
        """The k nearest rows of one unit vector; see `SearchIndex.find`.

        :raises DataError: the vector has another dimension, a column is not kept, or Milvus is not reached.
        :raises ConfigError: Milvus returns fewer rows than that at once.
        """
        if query.shape != (self.dim,):
            raise DataError(f"{self.folder}: the query has {query.shape[-1]} dimensions, the index {self.dim}")
        most = after.rows(POOL * k if diversity else k)
        if most > MOST_ROWS:
            raise ConfigError(f"k: {k}; Milvus returns at most {MOST_ROWS // (POOL if diversity else 1):,} rows here")
        conditions = [one_of(self._field(name), values) for name, values in where.items()]
        if len(hidden):
            conditions.append(f"{SAME} not in {json.dumps(sorted(set(self.of_rows(hidden, SAME))))}")
        expression = " and ".join(conditions)
        near = self._nearest(query, most, expression, distinct=distinct)
        held = {entity[ROW]: entity for _, entity in near}
        rows, scores = np.array(list(held), np.int64), np.array([score for score, _ in near], np.float32)
        words = self._words(after.text, most, expression, distinct=distinct) if after.is_fused else None
        found = ordered(
            Found(rows, scores, scores), words, after,
            query=query, k=k, diversity=diversity, texts=self.texts, vectors=self._vectors,
        )  # fmt: skip
        if more := [row for row in found.ids.tolist() if row not in held]:  # that BM25 alone has found
            fields = [ROW, *self.fields.values()]
            held |= {entity[ROW]: entity for entity in self.query(in_rows(np.array(more)), fields)}
        return [
            (float(score), {ROW: row} | {name: held[row][place] for name, place in self.fields.items()})
            for row, score in zip(found.ids.tolist(), found.cosines, strict=True)
        ]

    def _field(self, column: str) -> str:
        if column not in self.fields:
            kept = ", ".join(self.columns) or "none"
            raise DataError(f"{self.folder}: no column {column}; kept columns are {kept}")
        return self.fields[column]

    def _nearest(
        self, query: Vectors, k: int, expression: str, *, distinct: bool
    ) -> list[tuple[float, dict[str, Any]]]:
        """The k nearest entities, those with equal vectors in the order of their rows.

        Milvus orders ties as it likes, and cuts them: ask for more until k lie before the last one.
        """
        limit = min(k + SPARE, MOST_ROWS)
        while True:
            hits = self._hits(query, limit, expression)
            found = in_order(hits, distinct=distinct)
            is_all = len(hits) < limit or limit == MOST_ROWS
            if is_all or sum(score > hits[-1]["distance"] + TIE for score, _ in found) >= k:
                return found[:k]
            limit = min(4 * limit, MOST_ROWS)

    def _hits(self, query: Vectors, limit: int, expression: str) -> list[dict[str, Any]]:
        """What Milvus finds. If a graph or a few cells give too few of the allowed entities, all of them are compared
        here, or, if these are too many to send, the widest search is used."""
        knob, setting = self.manifest["search"]["knob"], self.manifest["search"]["setting"]
        fields = [SAME, *self.fields.values()]
        hits = self.nearest(query[None], limit, (knob, setting), fields, expression)[0]
        if not knob or len(hits) == limit or len(hits) == (allowed := self.count(expression)):
            return hits
        if allowed > MOST_ROWS:
            return self.nearest(query[None], limit, (knob, MOST_ROWS), fields, expression)[0]
        entities = self.query(expression, [ROW, VECTOR, *fields], limit=allowed)
        hits = [{"distance": float(np.array(entity.pop(VECTOR), np.float32) @ query), **entity} for entity in entities]
        return sorted(hits, key=lambda hit: -hit["distance"])[:limit]

    def _words(self, text: str, most: int, expression: str, *, distinct: bool) -> NDArray[np.float32]:
        """BM25's scores by row number, -inf for all but the best allowed rows: `most`, if that many share a word."""
        assert self.bm25 is not None
        words, allowed, done, size = np.full(self.rows[-1] + 1, -np.inf, np.float32), list[int](), 0, most
        if (scores := self.bm25.scores(text)) is None:
            return words
        best = self.rows[best_places(scores, len(scores))]
        if expression and self.count(expression) <= MOST_ROWS:  # if more are allowed, some are soon among the best
            best = best[np.isin(best, [entity[ROW] for entity in self.query(expression, [ROW])])]
        both = f"{expression} and " if expression else ""
        while done < len(best) and len(allowed) < most:
            found = self.query(both + in_rows(best[done : done + size]), [ROW, SAME])
            if distinct and found:
                digests = sorted({entity[SAME] for entity in found})
                same = self.query(f"{both}{SAME} in {json.dumps(digests)}", [ROW, SAME])
                first = {entity[SAME]: entity[ROW] for entity in sorted(same, key=lambda entity: -entity[ROW])}
                found = [entity for entity in found if entity[ROW] == first[entity[SAME]]]
            allowed += [entity[ROW] for entity in found]
            done, size = done + size, MOST_VALUES
        there = np.isin(self.rows, allowed)
        words[self.rows[there]] = scores[there]
        return words

    # --- rows by their ids ----------------------------------------------------------------------------------------

    def numbers_of(self, ids: Sequence[str], column: str | None) -> Ints:
        """Numbers of the rows that hold one of the ids.

        :param column: a kept column, or `ROW`; None takes the index's column of ids.
        :raises DataError: no row has an id; the column is not kept, or not known.
        """
        if (name := column or self.id_column) is None:
            kept = ", ".join(self.columns) or "none"
            raise DataError(f"{self.folder}: which column holds ids is not known; give id_column (kept: {kept})")
        place, found = ROW if name == ROW else self._field(name), list[dict[str, Any]]()
        for start in range(0, len(ids), MOST_VALUES):
            part = ids[start : start + MOST_VALUES]
            numbers = [int(text) for text in part if text.isascii() and text.isdigit()]
            found += self.query(f"{ROW} in {numbers}" if place == ROW else one_of(place, part), [ROW, place])
        if unknown := set(ids) - {str(entity[place]) for entity in found}:
            shown = ", ".join(sorted(unknown)[:5])
            raise DataError(f"{self.folder}: {len(unknown)} ids are not in column {name} ({shown})")
        return np.sort(np.array([entity[ROW] for entity in found], np.int64))

    rows_like = numbers_of  # deleted rows are gone

    def mean_vector(self, rows: Ints) -> Vectors:
        """The mean of rows' vectors, scaled to length 1."""
        return unit(self._vectors(rows).mean(axis=0, keepdims=True))[0]

    def _vectors(self, rows: Ints) -> Vectors:
        return np.array(self.of_rows(rows, VECTOR), np.float32).reshape(len(rows), self.dim)

    def texts(self, rows: Ints, column: str) -> list[str]:
        """The texts of rows, empty for null."""
        return [text or "" for text in self.of_rows(rows, self._field(column))]

    def first_texts(self, column: str, most: int) -> list[str | None]:
        """Values of a kept column, of some rows."""
        place = self._field(column)
        return [entity[place] for entity in self.query("", [place], limit=most)]


def in_order(hits: Sequence[Mapping[str, Any]], *, distinct: bool) -> list[tuple[float, dict[str, Any]]]:
    """Scores and entities, best first: equal vectors share a score, and are in the order of their rows.

    :param distinct: of equal vectors only the first row.
    """
    best, first = dict[str, float](), dict[str, int]()
    for hit in hits:
        best[hit[SAME]] = max(hit["distance"], best.get(hit[SAME], -np.inf))
        first[hit[SAME]] = min(hit[ROW], first.get(hit[SAME], hit[ROW]))
    found = sorted(hits, key=lambda hit: (-best[hit[SAME]], first[hit[SAME]], hit[ROW]))
    return [(best[hit[SAME]], dict(hit)) for hit in found if not distinct or hit[ROW] == first[hit[SAME]]]


def open_collection(folder: Path, manifest: dict[str, Any]) -> MilvusIndex:
    """Open the collection that an index folder's manifest names.

    :raises ConfigError: Milvus is not reached.
    :raises MissingError: the collection is not there.
    :raises DataError: the collection holds vectors of another model, or of another dimension.
    """
    entry = manifest[KIND]
    server = Server(entry["uri"] or str(folder / store.LITE_FILE), entry["token_file"])
    described = server.describe(entry["holds"])
    if described is None:
        raise MissingError(f"index {folder}: Milvus at {server.uri} has no collection {entry['holds']}; build it again")
    contract = {name: manifest[name] for name in ("model", "settings", "dimension", "id_column")}
    if read_contract(described) != contract:
        raise DataError(
            f"index {folder}: the collection {entry['holds']} at {server.uri} is another one than its manifest says "
            f"({said(described)}); build the index again"
        )
    rows, bm25 = NO_ROWS, None
    if words_column(manifest):
        rows = store.read_rows(store.place_of(folder, store.ROWS_FILE)).column(ROW).to_numpy()
        bm25 = store.read_bm25(store.place_of(folder, store.BM25_FILE), len(rows))
    return MilvusIndex(
        server=server, id_column=manifest["id_column"], name=entry["holds"], fields=entry["fields"], folder=folder,
        manifest=manifest, dim=manifest["dimension"], bm25=bm25, rows=rows,
    )  # fmt: skip
