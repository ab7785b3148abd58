"""An index in Milvus: what Faiss finds, uploads that continue, collections of others. Milvus Lite answers, as a file or
as a server that the tests stop."""

from __future__ import annotations

import itertools
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ebr_lib import extras
from ebr_lib.config import check_configs
from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.embeddings.files import read_embeddings, write_embeddings
from ebr_lib.data.fusion import Fusion
from ebr_lib.errors import ConfigError, DataError, MissingError, ModelError, NotInstalledError
from ebr_lib.index import milvus, milvus_upload
from ebr_lib.index.after import After
from ebr_lib.index.change import add_rows, delete_rows
from ebr_lib.index.config import IndexConfig
from ebr_lib.index.milvus import fields_of, in_order, one_of
from ebr_lib.index.opened import open_index
from ebr_lib.index.run import build_faiss_index
from ebr_lib.index.search import search
from ebr_lib.index.side_by_side import usual_queries
from ebr_lib.serve.config import ServeConfig
from ebr_lib.serve.run import _served
from tests.index.test_index import embedding_file

pytest.importorskip("pymilvus", reason="needs requirements-milvus.txt")

ROWS, DIM = 300, 8
HARD = [
    'a"b',
    "back\\slash",
    "line\nbreak",
    "tab\tcr\r",
    "it's",
    '" or _row >= 0 or "',
    "{x}",
    "中文 🎈",
    "%_",
    "",
    "\x01",
]


def drawn(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    if rows == ROWS:
        vectors[[40, 200]], vectors[100:170], vectors[299] = vectors[5], vectors[7], 0  # equal vectors, and none
    return vectors


def write(path: Path, vectors: np.ndarray, first: int = 0, model: str = "a") -> Path:
    numbers = range(first, first + len(vectors))
    columns = {
        "id": [str(i) for i in numbers],
        "类目": [None if i % 7 == 0 else HARD[i % len(HARD)] for i in numbers],
        "in": [f"text {i}" for i in numbers],
    }
    write_embeddings(path, columns, vectors)
    made_by = {"name": model, "path": model, "sha256": model * 64}
    about = {"model": made_by, "dimension": vectors.shape[1], "rows": {"written": len(vectors)}, "settings": {}}
    manifest_path(path).write_text(json.dumps(about))
    return path


def build(embeddings: Path, folder: Path, **knobs):
    settings = {"embedding_path": str(embeddings), "output_dir": str(folder), "kind": "milvus", "id_column": "id"}
    return build_faiss_index(settings | {"measure_queries": 20} | knobs)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """The same rows in Faiss and in Milvus."""
    place = tmp_path_factory.mktemp("milvus")
    write(place / "items.parquet", drawn())
    build(place / "items.parquet", place / "faiss", kind="Flat")
    build(place / "items.parquet", place / "milvus")
    return place


class Lite:
    """A server of Milvus Lite that can be stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = str(folder), 0
        self.start()

    def start(self) -> None:
        from milvus_lite.adapter.grpc.server import start_server_in_thread

        self.server, self.held, self.port = start_server_in_thread(self.folder, host="127.0.0.1", port=self.port)

    def stop(self) -> None:
        self.server.stop(0).wait()
        self.held.close()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def server(tmp_path):
    held = Lite(tmp_path / "server")
    yield held
    held.stop()


# --- what is found ------------------------------------------------------------------------------------------------

FILTERS = [
    {}, *({"类目": [value]} for value in HARD), {"类目": [None]}, {"类目": [None, 'a"b', "no such"]}, {"类目": []},
    {"id": ["5", "40", "7", "120"], "类目": [None, *HARD]}, {"id": [None]},
]  # fmt: skip


KINDS, FUSIONS = ("Flat", "milvus"), (Fusion("rrf"), Fusion("weighted", 0.4))


def by_length(pairs: list[tuple[str, str]]) -> np.ndarray:
    """A reranker."""
    return np.array([len(text) + sum(map(ord, text[-1:])) / 1e6 for _, text in pairs])


def test_finds_what_flat_finds(shop):
    faiss, held = open_index(shop / "faiss"), open_index(shop / "milvus")
    assert (len(held), held.dim, held.columns) == (ROWS, DIM, faiss.columns)
    knobs = [{}, {"distinct": True}, {"diversity": 0.4}, {"hidden": np.array([5, 7])},
             {"after": After("q", scores=by_length, depth=20, column="in"), "diversity": 0.2}]  # fmt: skip
    unit, sizes = milvus.unit(drawn()), itertools.cycle((1, 10, 90))
    for (query, where, more), k in zip(itertools.product((5, 7, 33), FILTERS, knobs), sizes, strict=False):
        wanted, found = (index.find(unit[query], k, where, **more) for index in (faiss, held))
        assert [row for _, row in found] == [row for _, row in wanted], (query, where, more, k)
        np.testing.assert_allclose([s for s, _ in found], [s for s, _ in wanted], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "setting"),
    [("HNSW8", "HNSW", {"M": 8}), ("IVF4,Flat", "IVF_FLAT", {"nlist": 4}), ("IVF4,SQ8", "IVF_SQ8", {"nlist": 4})],
)
def test_other_kinds_are_measured_and_find_all_that_a_filter_allows(shop, tmp_path, kind, name, setting):
    built = build(shop / "items.parquet", tmp_path / "index", kind=f"milvus:{kind}", target_recall=0.9)
    assert built.chosen.recall >= 0.9 and built.rows == ROWS
    held = open_index(tmp_path / "index")
    described = held.server.call("describe_index", held.name, "vector")
    assert described["index_type"] == name and setting.items() <= described["params"].items()
    some = [str(i) for i in range(0, ROWS, 11)]
    assert {row["id"] for _, row in held.find(milvus.unit(drawn())[0], len(some), {"id": some})} == set(some)


def test_search_gives_the_table_of_faiss(tmp_path, tiny_bert):
    embeddings = embedding_file(tmp_path / "embeds.txt", tiny_bert)
    folders = [build(embeddings, tmp_path / kind, kind=kind).folder for kind in ("Flat", "milvus")]
    for asked in ({"query": "steel pan"}, {"query": "鞋", "where": {"kind": "kitchen"}}, {"like": ["p1", "p2"]}):
        wanted, found = (search(folder, k=4, **asked) for folder in folders)
        pd.testing.assert_frame_equal(found, wanted, atol=1e-5, rtol=0)
    served = _served(ServeConfig.resolve({"index_dir": str(folders[1]), "judgements_dir": str(tmp_path / "judged")}))
    held, vectors = served.engine.encode("query", ["steel frying pan"])
    assert list(served.systems) == ["index"] and held.find(vectors[0], 1, {})[0][1]["description"] == "steel frying pan"
    assert usual_queries(folders[1], 2) == usual_queries(folders[0], 2)
    with pytest.raises(DataError, match="1 ids are not in column id"):
        search(folders[1], like="p99")
    with pytest.raises(ModelError, match="cannot be compared"):
        search(folders[1], "pan", model_name=str(_other_model(tmp_path, tiny_bert)))


def _other_model(folder: Path, model: Path) -> Path:
    import shutil

    from safetensors.numpy import load_file, save_file

    other = shutil.copytree(model, folder / "other")
    weights = next(other.rglob("*.safetensors"))
    tensors = {name: value * np.float32(1.5) for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    return other


WORDS = ["red", "blue", "steel", "pan", "shoes", "wool", "毯子", "手机壳", "透明", "南瓜", "lamp", "洗发水"]


def worded(path: Path, rows: int, first: int = 0) -> Path:
    """Rows of a few words; their vectors are those of `drawn`."""
    write(path, drawn(rows, seed=first), first)
    rng, columns = np.random.default_rng(first), dict(read_embeddings(path).columns)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(rows)]
    columns["in"] = [text if i % 17 else None for i, text in enumerate(texts)]
    write_embeddings(path, columns, drawn(rows, seed=first))
    return path


def test_hybrid_finds_what_hybrid_flat_finds(tmp_path, monkeypatch):
    """After rows were added and deleted as well; whether a filter allows few rows or many."""
    monkeypatch.setattr(milvus, "MOST_VALUES", 50)
    count, filters = milvus.MilvusIndex.count, [{}, {"类目": [None, 'a"b', "中文 🎈"]}, FILTERS[-2], {"id": [None]}]
    items, more = worded(tmp_path / "items.parquet", ROWS), worded(tmp_path / "more.parquet", 40, ROWS)
    folders = [build(items, tmp_path / kind, kind=kind, hybrid=True, text_column="in").folder for kind in KINDS]
    for change in (lambda _: None, lambda folder: add_rows(folder, more), lambda f: delete_rows(f, ["8", "310", "5"])):
        for folder in folders:
            change(folder)
        faiss, held = map(open_index, folders)
        rng, unit = np.random.default_rng(1), milvus.unit(drawn())
        knobs = [{}, {"distinct": True}, {"diversity": 0.4}, {"hidden": np.array([40, 7])}]
        for is_many, fusion, where, more_knobs in itertools.product((False, True), FUSIONS, filters, knobs):
            text, query = " ".join(rng.choice(WORDS, 2)), unit[rng.integers(ROWS)]
            after = After(text, fusion, by_length if is_many else None, 5 if is_many else 0, "in")
            monkeypatch.setattr(milvus.MilvusIndex, "count", (lambda *_: 10**6) if is_many else count)
            wanted, found = (index.find(query, 12, where, after=after, **more_knobs) for index in (faiss, held))
            assert [row for _, row in found] == [row for _, row in wanted], (text, fusion, where, more_knobs)
            np.testing.assert_allclose([s for s, _ in found], [s for s, _ in wanted], atol=1e-5)


def test_more_ties_than_spare_rows_come_in_the_order_of_rows(shop):
    found = open_index(shop / "milvus").find(milvus.unit(drawn())[7], 3, {})
    assert [row["_row"] for _, row in found] == [7, 100, 101]
    hits = [{"distance": 0.5, "_same": "x", "_row": 9}, {"distance": 0.5 + 1e-7, "_same": "x", "_row": 3},
            {"distance": 0.5 + 5e-8, "_same": "y", "_row": 1}]  # fmt: skip
    assert [hit["_row"] for _, hit in in_order(hits, distinct=False)] == [3, 9, 1]
    assert [hit["_row"] for _, hit in in_order(hits, distinct=True)] == [3, 1]


def test_expressions():
    assert one_of("a", ['x"\\', None]) == '(a in ["x\\"\\\\"] or a is null)'
    assert one_of("a", []) == "_row < 0"
    assert fields_of(["id", "类目", "in", "vector_2", "_row2"]) == {
        "id": "id", "类目": "_column_1", "in": "_column_2", "vector_2": "vector_2", "_row2": "_column_4",
    }  # fmt: skip


# --- uploads ------------------------------------------------------------------------------------------------------


class Wire:
    """What goes to Milvus: rows of each upsert, or parts of a deletion, and what happens before one of them."""

    def __init__(self) -> None:
        self.sent, self.act, self.at, self.method = list[int](), lambda: None, -1, "upsert"

    def act_at(self, upsert: int, act) -> None:
        self.sent.clear()
        self.at, self.act = upsert, act

    @contextmanager
    def lost(self, server: Lite, upsert: int, method: str = "upsert"):
        """Stop the server before an upsert, for good; start it again afterwards."""
        self.method = method
        self.act_at(upsert, server.stop)
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(DataError, match=r"Milvus at http\S+ is lost .*again"),
        ):
            patch.setattr(milvus, "LOST_SECONDS", 0.2)
            yield
        server.start()


@pytest.fixture
def wire(monkeypatch):
    """Requests of a few rows."""
    monkeypatch.setattr(milvus_upload, "REQUEST_BYTES", 4000)
    monkeypatch.setattr(milvus, "LOST_SECONDS", 20.0)  # gRPC waits a second before it tries again
    held, call = Wire(), milvus.Server.call

    def counted(self, method, *args, **arguments):
        if method == held.method:
            if len(held.sent) == held.at:
                held.at = -1
                held.act()
            held.sent.append(len(args[1]) if args[1:] else 0)
        return call(self, method, *args, **arguments)

    monkeypatch.setattr(milvus.Server, "call", counted)
    return held


def everything(folder: Path) -> list[dict]:
    held = open_index(folder)
    fields = ["_row", "_same", "vector", *held.fields.values()]
    return sorted(held.query("_row >= 0", fields), key=lambda entity: entity["_row"])


def test_a_lost_connection_continues_where_it_was(shop, tmp_path, server, wire):
    build(shop / "items.parquet", tmp_path / "whole", milvus_uri=server.uri, collection="whole")
    with wire.lost(server, 4):
        build(shop / "items.parquet", tmp_path / "index", milvus_uri=server.uri)
    arrived = json.loads((tmp_path / "index" / ".upload.json").read_text())["done"]
    assert arrived == sum(wire.sent[:4]) > 0
    wire.sent.clear()
    result = build(shop / "items.parquet", tmp_path / "index", milvus_uri=server.uri)
    assert sum(wire.sent) == ROWS - arrived and result.rows == ROWS and result.chosen.recall == 1
    assert everything(tmp_path / "index") == everything(tmp_path / "whole")
    assert not (tmp_path / "index" / ".upload.json").exists()


def test_a_short_break_is_not_noticed(shop, tmp_path, server, wire):
    def blink():
        server.stop()
        threading.Timer(0.3, server.start).start()

    wire.act_at(3, blink)
    assert build(shop / "items.parquet", tmp_path / "index", milvus_uri=server.uri).rows == ROWS


def test_a_failed_build_leaves_the_index_before_and_a_new_one_replaces_it(shop, tmp_path, server, wire):
    def interrupt():
        raise KeyboardInterrupt

    folder = tmp_path / "index"
    build(shop / "items.parquet", folder, milvus_uri=server.uri)
    other = write(tmp_path / "other.parquet", drawn(50, seed=1))
    wire.act_at(2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(other, folder, milvus_uri=server.uri)
    assert len(open_index(folder)) == ROWS and open_index(folder).find(drawn()[0], 1, {})
    third = write(tmp_path / "third.parquet", drawn(60, seed=2))  # the interrupted file is not continued
    build(third, folder, milvus_uri=server.uri)
    held = open_index(folder)
    assert len(held) == 60
    client = held.server._client
    assert client.list_collections() == [held.name] and client.describe_alias("ebr")["collection_name"] == held.name
    assert json.loads(client.describe_collection("ebr")["properties"]["ebr.contract"])["model"]["name"] == "a"


def test_rows_are_added_replaced_and_deleted_by_id(shop, tmp_path):
    folder = build(shop / "items.parquet", tmp_path / "index").folder
    more = write(tmp_path / "more.parquet", drawn(30, seed=3), first=290)
    assert add_rows(folder, more) == 320  # 290 to 299 are replaced
    found = open_index(folder).find(milvus.unit(drawn(30, seed=3))[0], 1, {})
    assert (found[0][1]["id"], found[0][1]["_row"]) == ("290", 300)
    assert delete_rows(folder, ["290", 5]) == 318 and len(open_index(folder)) == 318
    with pytest.raises(DataError, match="1 ids are not in column id"):
        delete_rows(folder, "290")
    assert delete_rows(folder, [7, 301], column="_row") == 316
    assert search(folder, like="8", k=1)["id"].tolist() != ["8"]
    with pytest.raises(ModelError, match="holds vectors of model b"):
        add_rows(folder, write(tmp_path / "b.parquet", drawn(3), model="b"))
    build(shop / "items.parquet", folder)
    assert len(open_index(folder)) == ROWS


@pytest.mark.parametrize("ids", ["id", None])
def test_an_interrupted_addition_continues(shop, tmp_path, server, wire, ids):
    knobs = {"milvus_uri": server.uri, "id_column": ids, "hybrid": True, "text_column": "in"}
    more = write(tmp_path / "more.parquet", drawn(40, seed=4), first=ROWS)
    whole = build(shop / "items.parquet", tmp_path / "whole", collection="whole", **knobs).folder
    assert add_rows(whole, more) == ROWS + 40
    folder = build(shop / "items.parquet", tmp_path / "index", **knobs).folder
    with wire.lost(server, 1):
        add_rows(folder, more)
    assert "a change is not finished" in search(folder, like="8", id_column="id").attrs["title"]
    with pytest.raises(DataError, match=r"more\.parquet have arrived only in part"):
        add_rows(folder, write(tmp_path / "third.parquet", drawn(2, seed=5), first=900))
    wire.sent.clear()
    assert add_rows(folder, more) == ROWS + 40 and 0 < sum(wire.sent) < 40
    assert everything(folder) == everything(whole)
    assert open_index(folder).manifest["next_row"] == ROWS + 40
    assert (folder / "bm25.npz").read_bytes() == (whole / "bm25.npz").read_bytes()
    assert "not finished" not in search(folder, like="8", id_column="id").attrs["title"]


@pytest.mark.parametrize("ids", ["id", None])
def test_an_interrupted_addition_takes_the_corrected_file(shop, tmp_path, server, wire, ids):
    folder = build(shop / "items.parquet", tmp_path / "index", milvus_uri=server.uri, id_column=ids).folder
    more, right = tmp_path / "more.parquet", drawn(40, seed=6)
    for seed in (4, 5):
        assert len(open_index(folder)) >= ROWS  # connected again
        with wire.lost(server, 1):
            add_rows(folder, write(more, drawn(40, seed=seed), first=298))
    assert add_rows(folder, write(more, right, first=300)) == (338 if ids else 340)  # 298 and 299 had been replaced
    held, rows = open_index(folder), everything(folder)
    assert [row["id"] for row in rows[-40:]] == [str(i) for i in range(300, 340)]
    assert len({row["_row"] for row in rows}) == len(rows) and held.manifest["next_row"] > rows[-1]["_row"]
    for i in (0, 39):
        assert held.find(milvus.unit(right)[i], 1, {})[0][1]["id"] == str(300 + i)


def test_a_killed_addition_that_was_complete_is_not_in_the_way(shop, tmp_path, monkeypatch):
    folder = build(shop / "items.parquet", tmp_path / "index").folder
    more = write(tmp_path / "more.parquet", drawn(3), first=ROWS)
    with monkeypatch.context() as patch:  # killed before it removed its state
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        assert add_rows(folder, more) == ROWS + 3
    assert (folder / ".append.json").exists() and not open_index(folder).unfinished
    assert add_rows(folder, write(tmp_path / "third.parquet", drawn(2), first=900)) == ROWS + 5


def test_an_interrupted_deletion_continues(shop, tmp_path, server, wire, monkeypatch):
    monkeypatch.setattr(milvus_upload, "MOST_VALUES", 5)
    folder = build(shop / "items.parquet", tmp_path / "index", milvus_uri=server.uri).folder

    def broken() -> tuple[int, list[str]]:
        before, ids = len(open_index(folder)), [row["id"] for row in everything(folder)[20:40]]
        with wire.lost(server, 2, "delete"):
            delete_rows(folder, ids)
        assert len(open_index(folder)) == before - 10
        assert "a change is not finished" in search(folder, like="8").attrs["title"]
        return before - 20, ids

    left, ids = broken()
    assert delete_rows(folder, ids) == left and not open_index(folder).unfinished
    left, ids = broken()  # other changes finish it
    assert delete_rows(folder, "299") == left - 1 and not {row["id"] for row in everything(folder)} & set(ids)
    left, ids = broken()
    assert add_rows(folder, write(tmp_path / "more.parquet", drawn(1), first=900)) == left + 1
    assert not {row["id"] for row in everything(folder)} & set(ids)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_rows_that_are_refused_do_not_stop_others(shop, tmp_path):
    folder = build(shop / "items.parquet", tmp_path / "index").folder
    with pytest.raises(DataError, match=f"holds vectors of {DIM // 2} dimensions, the index {DIM}"):
        add_rows(folder, write(tmp_path / "narrow.parquet", drawn(3)[:, : DIM // 2], first=900))
    assert add_rows(folder, write(tmp_path / "more.parquet", drawn(3), first=ROWS)) == ROWS + 3


def test_unreachable_milvus(shop, tmp_path, monkeypatch):
    for uri, reason in (("http://127.0.0.1:1", "no Milvus at http://127.0.0.1:1"), ("ftp://x", "illegal")):
        with pytest.raises(ConfigError, match=reason):
            build(shop / "items.parquet", tmp_path / "index", milvus_uri=uri)
    assert not (tmp_path / "index").exists()
    monkeypatch.setenv("MILVUS_URI", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="check milvus_uri"):
        build(shop / "items.parquet", tmp_path / "index")


def test_a_collection_of_others_is_not_replaced(shop, tmp_path, server):
    build(shop / "items.parquet", tmp_path / "index", milvus_uri=server.uri)
    wide = write(tmp_path / "wide.parquet", np.ones((5, 4), np.float32), model="b")
    with pytest.raises(ConfigError, match=r"has a collection ebr .*: it holds vectors of model a, 8 dimensions; give"):
        build(wide, tmp_path / "second", milvus_uri=server.uri)
    client = open_index(tmp_path / "index").server._client
    client.create_collection("mine", dimension=4)
    with pytest.raises(ConfigError, match=r"has a collection mine .*: it was not made by this stage"):
        build(wide, tmp_path / "second", milvus_uri=server.uri, collection="mine")
    assert not (tmp_path / "second").exists()


def test_a_collection_that_changed_or_went_is_not_searched(shop, tmp_path, server):
    folder = build(shop / "items.parquet", tmp_path / "index", milvus_uri=server.uri).folder
    wide = write(tmp_path / "wide.parquet", np.ones((5, 4), np.float32), model="b")
    second = build(wide, tmp_path / "second", milvus_uri=server.uri, collection="b").folder
    manifest, other = (json.loads((place / "manifest.json").read_text()) for place in (folder, second))
    changed = manifest | {"milvus": manifest["milvus"] | {"holds": other["milvus"]["holds"]}}
    (folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=r"another one than its manifest says .*vectors of model b, 4 dimensions"):
        open_index(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    held = open_index(folder)
    held.server.call("drop_collection", held.name)
    with pytest.raises(MissingError, match="has no collection ebr_"):
        open_index(folder)
    with pytest.raises(DataError, match="refuses search"):
        held.find(drawn()[0], 3, {})


def test_rows_that_milvus_cannot_hold(shop, tmp_path):
    def refused(columns: dict, message: str, **knobs) -> None:
        place = tmp_path / "bad.parquet"
        write_embeddings(place, columns, drawn(3))
        with pytest.raises(DataError, match=message):
            build(place, tmp_path / "index", **knobs)

    refused({"id": ["a", "b", "a"]}, "1 rows have the id of another row .column id")
    refused({"id": ["a", None, "c"]}, "row 1 has no id")
    refused({"id": ["a", "b", "c"], "text": ["", "字" * 22_000, ""]}, "row 1: text holds 66,000 bytes")
    refused({"id": ["a", "b", "a"]}, "has no column|no column sku", id_column="sku")


def test_knobs_that_do_not_fit(shop, tmp_path):
    for knobs, message in (
        ({"kind": "milvus:PQ8"}, "kind milvus:PQ8: wanted milvus"),
        ({"milvus_uri": "http://me:secret@host:1"}, "leave user and password out"),
        ({"milvus_uri": "http://host:1", "kind": "Flat"}, "need kind: milvus, not Flat"),
        ({"collection": "商品-1"}, "collection: '商品-1' is not a name that Milvus takes; wanted up to 200 letters"),
        ({"collection": "1st"}, "the first not a digit"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(shop / "items.parquet", tmp_path / "index", **knobs)
    with pytest.raises(ConfigError, match="k: 20000; Milvus returns at most 16,384"):
        open_index(shop / "milvus").find(drawn()[0], 20_000, {})
    held = r"output_dir: .*faiss holds a Faiss index \(index\.faiss, .*which kind: milvus does not replace"
    with pytest.raises(ConfigError, match=held):
        build(shop / "items.parquet", shop / "faiss")
    held = r"output_dir: .*milvus holds a Milvus collection \(milvus\.db\), which kind: Flat does not replace; give"
    with pytest.raises(ConfigError, match=held):
        build(shop / "items.parquet", shop / "milvus", kind="Flat")
    with pytest.raises(ConfigError, match=held):  # and before anything runs
        knobs = {"embedding_path": str(shop / "items.parquet"), "output_dir": str(shop / "milvus"), "kind": "Flat"}
        check_configs(index=knobs, run={"index": True})


def test_the_missing_package_is_named(shop, tmp_path, monkeypatch):
    extras.require.cache_clear()
    monkeypatch.setattr(extras, "find_spec", lambda name: None if "milvus" in name else object())
    with pytest.raises(NotInstalledError, match=r"pymilvus, milvus_lite; run: pip install 'ebr-workflow\[milvus\]'"):
        build(shop / "items.parquet", tmp_path / "index")
    extras.require.cache_clear()


def test_the_token_reaches_milvus_and_no_file(shop, tmp_path, server, monkeypatch):
    import pymilvus

    seen, real = list[str](), pymilvus.MilvusClient

    def client(uri, token, **more):
        seen.append(token)
        return real(uri, **more)

    client.create_schema, client.prepare_index_params = real.create_schema, real.prepare_index_params
    monkeypatch.setattr(pymilvus, "MilvusClient", client)
    monkeypatch.setenv("MILVUS_TOKEN", "me:hidden1")
    build(shop / "items.parquet", tmp_path / "index", milvus_uri=server.uri)
    (tmp_path / "token").write_text("hidden2\n")
    build(shop / "items.parquet", tmp_path / "index", milvus_uri=server.uri, milvus_token_file=str(tmp_path / "token"))
    open_index(tmp_path / "index")
    assert seen == ["me:hidden1", "hidden2", "hidden2"]
    saved = [file.read_bytes() for file in (tmp_path / "index").iterdir() if file.is_file()]
    assert not any(b"hidden" in text for text in saved)


def test_the_saved_config_repeats_the_build(shop):
    config = IndexConfig.resolve({"preset": str(shop / "milvus" / "index_config.yaml")})
    assert (config.kind, config.collection, config.uri) == ("milvus", "ebr", None)
