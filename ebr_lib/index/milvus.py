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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.extras import require
from ebr_lib.files import read_token
from ebr_lib.index.after import POOL, VECTORS_ALONE, After, Found, diverse, reranked
from ebr_lib.index.store import LITE_FILE, NO_ROWS, ROW
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
LITE_OPTIONS = {
    "grpc.keepalive_time_ms": 330_000
}  # its server hangs up on whoever pings often while it builds an index
CONNECT_FAILED, NOT_LOADED = 2, 101  # codes of Milvus's errors
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,200}")
RESERVED = {"and", "or", "not", "in", "like", "is", "null", "true", "false", "exists", "vector", "rowid", "timestamp"}


# --- the server ---------------------------------------------------------------------------------------------------


def address_of(folder: Path, uri: str | None) -> str:
    """Address of the server of an index folder: its own file of Milvus Lite, if no other is given."""
    return uri or str(folder / LITE_FILE)


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

    def count(self, collection: str, expression: str = "") -> int:
        """Number of entities that an expression allows."""
        arguments: dict[str, Any] = {"filter": expression, "output_fields": ["count(*)"], "consistency_level": "Strong"}
        return int(self.call("query", collection, **arguments)[0]["count(*)"])

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()


def check_milvus(uri: str | None, token_file: str | None) -> None:
    """Check that Milvus is installed, and answers if it is a server.

    :raises NotInstalledError: it is not.
    :raises ConfigError: it does not.
    """
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


def quoted(text: str) -> str:
    """A text as a literal of Milvus's expressions."""
    return f'"{text.translate(_ESCAPES)}"'


def one_of(field: str, values: Sequence[str | None]) -> str:
    """Expression: the field has one of the values; None is null."""
    texts = ", ".join(quoted(value) for value in values if value is not None)
    parts = [f"{field} in [{texts}]"] if texts else []
    parts += [f"{field} is null"] if None in values else []
    return f"({' or '.join(parts)})" if parts else f"{ROW} < 0"  # no value allows no row


def in_rows(rows: Ints) -> str:
    """Expression: the row has one of the numbers."""
    return f"{ROW} in {rows.tolist()}"


def contract_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What of an index's manifest its collection says as well: model, settings (with the prompt), dimension, ids."""
    return {name: manifest.get(name) for name in ("model", "settings", "dimension", "id_column")}


def read_contract(described: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contract in a collection's properties; None for a collection that was not made here."""
    text = (described.get("properties") or {}).get(CONTRACT)
    return dict(json.loads(text)) if text else None


def said(contract: Mapping[str, Any] | None) -> str:
    """A contract, for an error."""
    if contract is None:
        return "it was not made by this stage"
    return f"it holds vectors of {Provenance.of(contract).said}, {contract['dimension']} dimensions"


# --- the opened index ---------------------------------------------------------------------------------------------


@dataclass
class MilvusIndex:
    """An opened index folder whose rows are in Milvus; found, hidden and diverse rows are as in `SearchIndex`."""

    folder: Path
    server: Server = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    hybrid: None = None  # BM25 is kept beside Faiss alone

    @property
    def name(self) -> str:
        """The collection."""
        return str(self.manifest[KIND]["holds"])

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return int(self.manifest["dimension"])

    @property
    def fields(self) -> dict[str, str]:
        """Kept column to its field."""
        return dict(self.manifest[KIND]["fields"])

    @property
    def columns(self) -> list[str]:
        """Names of the kept columns."""
        return list(self.fields)

    def __len__(self) -> int:
        return self.server.count(self.name)

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
        wanted = POOL * k if diversity else k
        if after.rows(wanted) > MOST_ROWS:
            raise ConfigError(f"k: {k}; Milvus returns at most {MOST_ROWS // (POOL if diversity else 1):,} rows here")
        conditions = [one_of(self._field(name), values) for name, values in where.items()]
        if len(hidden):
            conditions.append(f"{SAME} not in {json.dumps(self._digests(hidden))}")
        found = self._nearest(query, after.rows(wanted), " and ".join(conditions), distinct=distinct)
        scores = np.array([score for score, _ in found], np.float32)
        ranked = Found(np.arange(len(found)), scores, scores)
        if after.scores:
            texts = [entity[self._field(after.column)] or "" for _, entity in found[: after.depth]]
            ranked = reranked(ranked, texts, after)
        ranked = ranked.at(slice(wanted))
        if diversity:
            ranked = diverse(ranked, self._vectors([found[i][1] for i in ranked.ids]), k, diversity, after)
        return [(found[i][0], self._row_of(found[i][1])) for i in ranked.ids]

    def _field(self, column: str) -> str:
        if column not in self.fields:
            kept = ", ".join(self.columns) or "none"
            raise DataError(f"{self.folder}: no column {column}; kept columns are {kept}")
        return self.fields[column]

    def _row_of(self, entity: Mapping[str, Any]) -> dict[str, Any]:
        return {ROW: entity[ROW]} | {name: entity[field] for name, field in self.fields.items()}

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
        hits = self._ask(query, limit, expression, search_setting(knob, setting, limit))
        if not knob or len(hits) == limit or len(hits) == (allowed := self.server.count(self.name, expression)):
            return hits
        if allowed > MOST_ROWS:
            return self._ask(query, limit, expression, search_setting(knob, MOST_ROWS, limit))
        fields = [ROW, SAME, VECTOR, *self.fields.values()]
        entities = self.entities(expression, fields, limit=allowed)
        hits = [{"distance": float(np.array(entity.pop(VECTOR), np.float32) @ query), **entity} for entity in entities]
        return sorted(hits, key=lambda hit: -hit["distance"])[:limit]

    def _ask(self, query: Vectors, limit: int, expression: str, params: Mapping[str, int]) -> list[dict[str, Any]]:
        found = self.server.call(
            "search", self.name, data=[query.tolist()], anns_field=VECTOR, limit=limit, filter=expression,
            output_fields=[ROW, SAME, *self.fields.values()], search_params={"metric_type": "IP", "params": params},
        )  # fmt: skip
        return [{"distance": hit["distance"], **hit["entity"]} for hit in found[0]]

    # --- rows by their ids ----------------------------------------------------------------------------------------

    def entities(self, expression: str, fields: Sequence[str], **arguments: Any) -> list[dict[str, Any]]:
        """Fields of the entities that an expression allows."""
        return list(self.server.call("query", self.name, filter=expression, output_fields=list(fields), **arguments))

    def rows_like(self, ids: Sequence[str], column: str | None) -> Ints:
        """Numbers of the rows with these ids; see `SearchIndex.rows_like`.

        :raises DataError: no row has an id; which column holds ids is not known.
        """
        if (name := column or self.manifest.get("id_column")) is None:
            kept = ", ".join(self.columns) or "none"
            raise DataError(f"{self.folder}: which column holds ids is not known; give id_column (kept: {kept})")
        return self.numbers_of(ids, name)

    def numbers_of(self, ids: Sequence[str], column: str) -> Ints:
        """Numbers of the rows that hold one of the ids.

        :param column: a kept column, or `ROW`.
        :raises DataError: no row has an id, or the column is not kept.
        """
        place = ROW if column == ROW else self._field(column)
        found = [entity for part in self._expressions(place, ids) for entity in self.entities(part, [ROW, place])]
        if unknown := set(ids) - {str(entity[place]) for entity in found}:
            shown = ", ".join(sorted(unknown)[:5])
            raise DataError(f"{self.folder}: {len(unknown)} ids are not in column {column} ({shown})")
        return np.sort(np.array([entity[ROW] for entity in found], np.int64))

    def _expressions(self, place: str, ids: Sequence[str]) -> Iterator[str]:
        """Expressions for the ids, some at a time."""
        for start in range(0, len(ids), MOST_VALUES):
            part = ids[start : start + MOST_VALUES]
            if place == ROW:
                numbers = [int(text) for text in part if text.isascii() and text.isdigit()]
                yield in_rows(np.array(numbers, np.int64))
            else:
                yield one_of(place, part)

    def mean_vector(self, rows: Ints) -> Vectors:
        """The mean of rows' vectors, scaled to length 1."""
        return unit(self._vectors([{ROW: row} for row in rows.tolist()]).mean(axis=0, keepdims=True))[0]

    def _vectors(self, entities: Sequence[Mapping[str, Any]]) -> Vectors:
        """Vectors of entities, in their order."""
        rows = np.array([entity[ROW] for entity in entities], np.int64)
        held = {entity[ROW]: entity[VECTOR] for entity in self.entities(in_rows(rows), [ROW, VECTOR])}
        return np.array([held[row] for row in rows.tolist()], np.float32).reshape(len(rows), self.dim)

    def _digests(self, rows: Ints) -> list[str]:
        return sorted({entity[SAME] for entity in self.entities(in_rows(rows), [SAME])})

    def texts(self, rows: Ints, column: str) -> list[str]:
        """The texts of rows, empty for null."""
        place = self._field(column)
        held = {entity[ROW]: entity[place] for entity in self.entities(in_rows(rows), [ROW, place])}
        return [held[row] or "" for row in rows.tolist()]

    def first_texts(self, column: str, most: int) -> list[str | None]:
        """Values of a kept column, of some rows."""
        place = self._field(column)
        return [entity[place] for entity in self.entities("", [place], limit=most)]


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


def search_setting(knob: str | None, setting: int, limit: int) -> dict[str, int]:
    """Milvus's parameters of a search, for a setting of the knob that Faiss names."""
    if knob == "efSearch":
        return {"ef": max(setting, limit)}
    return {"nprobe": setting} if knob == "nprobe" else {}


def open_collection(folder: Path, manifest: dict[str, Any]) -> MilvusIndex:
    """Open the collection that an index folder's manifest names.

    :raises ConfigError: Milvus is not reached.
    :raises MissingError: the collection is not there.
    :raises DataError: the collection holds vectors of another model, or of another dimension.
    """
    entry = manifest[KIND]
    server = Server(address_of(folder, entry["uri"]), entry["token_file"])
    described = server.describe(entry["holds"])
    if described is None:
        raise MissingError(f"index {folder}: Milvus at {server.uri} has no collection {entry['holds']}; build it again")
    if (found := read_contract(described)) != json.loads(json.dumps(contract_of(manifest))):
        raise DataError(
            f"index {folder}: the collection {entry['holds']} at {server.uri} is another one than its manifest says "
            f"({said(found)}); build the index again"
        )
    return MilvusIndex(folder, server, manifest)
