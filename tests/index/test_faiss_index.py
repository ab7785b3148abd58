"""The parts of the index: its kind, its recall, its filter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ebr_lib.data.embeddings.base import Embeddings
from ebr_lib.errors import ConfigError, DataError
from ebr_lib.index.after import marginal
from ebr_lib.index.build import fill, new_index, plan_index, train
from ebr_lib.index.faiss_tools import cells_of
from ebr_lib.index.measure import Truth, exact_neighbours, measure_point, recall_of, sweep
from ebr_lib.index.opened import SearchIndex
from ebr_lib.index.search import search
from ebr_lib.index.store import read_rows
from ebr_lib.metrics import unit

KINDS = ("Flat", "HNSW16", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8x4fs,Refine(SQ8)", "PCA12,IVF8,Flat", "SQ8")


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    return unit((centres[rng.integers(0, 20, 700)] + 0.5 * rng.normal(size=(700, 16))).astype(np.float32))


def build(kind, vectors, folder, batch=128):
    plan = plan_index(len(vectors), 16, kind)
    index = new_index(plan, 16, 40)
    if not index.is_trained:
        train(index, vectors, 0)
    labels = [f"id{i}" for i in range(len(vectors))]
    batches = [
        Embeddings(part * 3, {"id": labels[i : i + batch], "half": ["ab"[j % 2] for j in range(i, i + len(part))]},
                   np.arange(i, i + len(part)), len(part))
        for i, part in ((i, vectors[i : i + batch]) for i in range(0, len(vectors), batch))
    ]  # fmt: skip
    distinct, gathered, numbers = fill(index, batches, folder / "rows", np.array([0, 127, 128, 650]))
    np.testing.assert_array_equal(numbers, np.unique(distinct.of_row[[0, 127, 128, 650]]))
    np.testing.assert_allclose(gathered, vectors[distinct.first][numbers], atol=1e-6)
    manifest = {"search": {"knob": plan.knob, "setting": plan.settings(8)[-1]}}
    of_row = distinct.of_row if index.ntotal < len(vectors) else np.empty(0, np.int64)
    return plan, SearchIndex(folder, index, read_rows(folder / "rows"), manifest, np.empty(0, np.int64), of_row)


def test_kind_depends_on_the_number_of_vectors():
    assert [plan_index(n, 384).factory for n in (10, 50_000, 50_001, 1_000_000)] == ["Flat", "Flat", "HNSW32", "HNSW32"]
    assert plan_index(4_000_000, 384).factory == "IVF8192,SQ8"
    assert plan_index(4_000_000, 384, compression="pq").factory == "IVF8192,PQ192x4fs,Refine(SQ8)"
    assert plan_index(4_000_000, 384, "HNSW64").knob == "efSearch"
    with pytest.raises(ConfigError, match="not a Faiss factory string"):
        new_index(plan_index(10, 8, "HSNW32"), 8, 40)
    with pytest.raises(DataError, match="5 vectors cannot train 8 cells"):
        train(new_index(plan_index(5, 4, "IVF8,Flat"), 4, 40), np.ones((5, 4), np.float32), 0)


@pytest.mark.parametrize("kind", ["IDMap,Flat", "IDMap2,HNSW16", "PQ8x4fs", "PQ8", "OPQ8_16,PQ8", "NSG16", "HNSW8_PQ4"])
def test_unusable_kinds_are_refused_before_building(kind):
    with pytest.raises(
        ConfigError, match=f"kind '{kind}': .*(leave IDMap out|cannot search under a filter|a part at a time)"
    ):
        new_index(plan_index(10, 16, kind), 16, 40)


@pytest.mark.parametrize("kind", ["HNSW16", "PCA12,HNSW16", "HNSW16,RFlat"])
def test_ef_construction_reaches_the_graph_inside_other_indexes(kind):
    import faiss

    index = new_index(plan_index(10, 16, kind), 16, 123)
    part = index.index if "PCA" in kind else getattr(index, "base_index", index)
    assert faiss.downcast_index(part).hnsw.efConstruction == 123


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_searches_filters_and_measures(kind, vectors, tmp_path):
    plan, held = build(kind, vectors, tmp_path)
    exact = np.argsort(-(vectors @ vectors[5]))
    found = [row["_row"] for _, row in held.find(vectors[5], 10, {})]
    assert found[0] == 5
    assert len(set(found) & set(exact[:10].tolist())) >= (5 if "PCA" in kind else 9)
    odd = held.find(vectors[5], 10, {"half": ["b"]})
    assert [row["half"] for _, row in odd] == ["b"] * 10 and odd[0][1]["id"] == "id5"
    truth = exact_neighbours(held.index, [vectors], vectors[:50], np.arange(50))
    points, chosen = sweep(held.index, truth, plan, 0.9)
    assert [p.setting for p in points] == sorted(p.setting for p in points) and chosen in points
    assert chosen.recall >= 0.9 or chosen == points[-1]
    assert (cells_of(held.index) == 8) == ("IVF" in kind)


@pytest.mark.parametrize("kind", ["Flat", "HNSW16", "IVF8,SQ8"])
def test_rows_like_others_are_the_nearest_to_their_mean(kind, vectors, tmp_path):
    held = build(kind, vectors, tmp_path)[1]
    exact = np.argsort(-(vectors @ vectors[5])).tolist()
    found = search(held, like="id5", k=9, id_column="id")
    assert len(set(found.index) & set(exact[1:10])) >= 8 and 5 not in found.index
    assert found.attrs["query"] == "like id5"
    mean = vectors[5] + vectors[9]
    nearest = [row for row in np.argsort(-(vectors @ mean)).tolist() if row not in (5, 9)]
    assert len(set(search(held, like=["id5", "id9"], k=9, id_column="id").index) & set(nearest[:9])) >= 8
    with pytest.raises(DataError, match="which column holds ids is not known; give id_column"):
        search(held, like="5")
    with pytest.raises(DataError, match="1 ids are not in column id"):
        search(held, like=["nobody", "id5"], id_column="id")
    with pytest.raises(ConfigError, match="a query, or ids as like, and not both"):
        search(held, "blanket", like="id5")


def test_diverse_rows_by_hand():
    """Of the two nearest, which are alike, the second gives way to one that is a little farther."""
    vectors = np.array([[1, 0], [0.999, 0.04], [0.8, -0.6]], np.float32)
    scores = np.array([0.95, 0.94, 0.9], np.float32)
    assert marginal(scores, vectors, 2, 0.0).tolist() == [0, 1]
    # .5 · .94 - .5 · .999 = -.03 against .5 · .9 - .5 · .8 = .05
    assert marginal(scores, vectors, 3, 0.5).tolist() == [0, 2, 1]


def test_diversity_leaves_near_copies_out(vectors, tmp_path):
    near = vectors.copy()
    near[1] = unit(vectors[:1] + np.float32(0.001))[0]
    held = build("Flat", near, tmp_path)[1]
    assert set(held_rows(held.find(near[0], 2, {}))) == {0, 1}
    first, second = held_rows(held.find(near[0], 2, {}, diversity=0.6))
    assert first in (0, 1) and second not in (0, 1)


def test_diversity_leaves_rows_with_the_same_vector_out(vectors, tmp_path, tmp_path_factory, monkeypatch):
    twins = np.concatenate([vectors[[7]].repeat(30, 0), vectors])
    held = build("Flat", twins, tmp_path)[1]
    few = build("Flat", np.concatenate([vectors[[7]], vectors]), tmp_path_factory.mktemp("few"))[1]
    first, second = held_rows(few.find(vectors[7], 2, {}, diversity=0.6))
    assert first == 0 and second not in (0, 8)
    encoder = SimpleNamespace(encode=lambda texts: vectors[[7]])
    monkeypatch.setattr("ebr_lib.index.search.query_spec", lambda *args, **knobs: None)
    monkeypatch.setattr("ebr_lib.index.search.query_encoder", lambda *args: encoder)
    same = {*range(30), 37}
    assert len(set(search(held, "blanket", 2, diversity=0.1).index) & same) == 1
    assert len(set(search(held, "blanket", 2, diversity=0.1, distinct=False).index) & same) == 2
    assert len(set(search(held, "blanket", 2).index) & same) == 2


def test_deleted_ids_are_named_even_beside_others(vectors, tmp_path):
    held = build("Flat", vectors, tmp_path)[1]
    held.deleted = np.array([9])
    with pytest.raises(DataError, match="the rows with ids id9 are deleted"):
        search(held, like=["id5", "id9"], id_column="id")


def held_rows(found) -> list[int]:
    return [row["_row"] for _, row in found]


@pytest.mark.parametrize("kind", ["Flat", "HNSW16", "IVF8,SQ8"])
def test_filter_through_the_index_when_many_rows_pass(kind, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr("ebr_lib.index.opened.EXACT_ROWS", 10)
    held = build(kind, vectors, tmp_path)[1]
    held.deleted = np.array([5])
    found = held.find(vectors[5], 10, {"half": ["a", "b"]})
    assert len(found) == 10 and "id5" not in [row["id"] for _, row in found]
    assert {row["half"] for _, row in held.find(vectors[5], 300, {"half": ["a"]})} == {"a"}
    assert len(held) == 699


@pytest.fixture
def two_clusters():
    """Vectors around two opposite centres, and which of them are of the second."""
    rng = np.random.default_rng(3)
    second = rng.random(700) < 0.5
    centre = np.r_[1.0, np.zeros(15)]
    return unit(
        (np.where(second[:, None], -3 * centre, 3 * centre) + rng.normal(size=(700, 16))).astype(np.float32)
    ), second


@pytest.mark.parametrize("kind", [*KINDS, "HNSW16,RFlat", "PCA16,HNSW16"])
def test_filter_finds_the_nearest_rows_however_far_they_are(kind, two_clusters, tmp_path, monkeypatch):
    """The query is in one cluster, all allowed rows are in the other: a graph or one cell sees none of them."""
    vectors, second = two_clusters
    held = build(kind, vectors, tmp_path)[1]
    names = held.rows.column_names
    held.rows = held.rows.set_column(names.index("half"), "half", [["b" if b else "a" for b in second]])
    held.manifest["search"]["setting"] = 1 if held.manifest["search"]["knob"] == "nprobe" else 16
    query = vectors[~second][0]
    exact = np.flatnonzero(second)[np.argsort(-(vectors[second] @ query))]
    for few in (10, 20_000):
        monkeypatch.setattr("ebr_lib.index.opened.EXACT_ROWS", few)
        found = held.find(query, 10, {"half": ["b"]})
        rows = [row["_row"] for _, row in found]
        assert {row["half"] for _, row in found} == {"b"} and len(set(rows)) == 10
        assert len(set(rows) & set(exact[:10])) >= (4 if "PCA12" in kind else 9)
        scores = [score for score, _ in found]
        assert scores == sorted(scores, reverse=True) and scores == pytest.approx(vectors[rows] @ query, abs=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_deleted_rows_are_replaced_by_the_next_nearest(kind, two_clusters, tmp_path, monkeypatch):
    monkeypatch.setattr("ebr_lib.index.opened.EXACT_ROWS", 10)
    vectors, second = two_clusters
    held = build(kind, vectors, tmp_path)[1]
    query = vectors[second][0]
    held.deleted = np.argsort(-(vectors @ query))[1:6]  # a few of the nearest
    few = [row["_row"] for _, row in held.find(query, 10, {})]
    assert few[0] == np.flatnonzero(second)[0] and len(few) == 10 and not set(few) & set(held.deleted)
    held.deleted = np.flatnonzero(second)  # a whole cluster
    many = [row["_row"] for _, row in held.find(query, 10, {})]
    assert len(many) == 10 and not second[many].any()
    assert len(held.find(query, 1000, {})) == (~second).sum()


def test_k_rows_are_found_even_if_the_nearest_cells_hold_fewer(tmp_path):
    """One cell of 640 rows and seven of ten each: the nearest cell of a query alone does not hold fifty rows."""
    rng = np.random.default_rng(0)
    sizes = [640] + [10] * 7
    rows = np.concatenate([np.eye(8, 16)[[i]].repeat(n, 0) for i, n in enumerate(sizes)])
    vectors = unit((rows + 0.01 * rng.normal(size=rows.shape)).astype(np.float32))
    _, index = build("IVF8,Flat", vectors, tmp_path)
    index.manifest["search"]["setting"] = 1
    for k in (10, 50, 5000):
        found = [row["id"] for _, row in index.find(vectors[-1], k, {})]
        assert len(set(found)) == len(found) == min(k, len(vectors))


def test_find_refuses_other_dimensions_and_unknown_columns(vectors, tmp_path):
    held = build("Flat", vectors, tmp_path)[1]
    with pytest.raises(DataError, match="8 dimensions, the index 16"):
        held.find(np.ones(8, np.float32), 5, {})
    with pytest.raises(DataError, match="no column brand to filter by; kept columns are id, half"):
        held.find(vectors[0], 5, {"brand": ["x"]})
    assert held.find(vectors[0], 5, {"half": ["c"]}) == []
    assert len(held.find(vectors[0], 10_000, {})) == 700


def test_recall_counts_ties_as_found_and_leaves_out_the_query_itself():
    ids, scores = np.arange(12)[None], np.r_[[1.0] * 2, [0.5] * 10][None].astype(np.float32)
    truth = Truth(np.ones((1, 2), np.float32), np.array([-1]), ids, scores)
    index = SimpleNamespace(ntotal=12)  # the list of the nearest holds them all
    assert recall_of(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 11]]), truth, index) == 1  # as good as number 9
    assert recall_of(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 77]]), truth, index) == 0.9
    own = Truth(truth.queries, np.array([0]), ids, np.where(ids == 0, -np.inf, scores))
    assert recall_of(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]), own, index) == 1
    few = Truth(truth.queries, np.array([0]), ids, np.where(ids > 2, -np.inf, own.scores))
    assert recall_of(np.array([[0, 1, 2, -1]]), few, index) == 1


@pytest.mark.parametrize("kind", ["Flat", "HNSW16", "IVF8,SQ8", "IVF8,PQ8x4fs,Refine(SQ8)"])
def test_recall_counts_any_of_many_equal_vectors(kind, vectors, tmp_path):
    """300 vectors are equal except for rounding: the list of the nearest holds only some of them."""
    many = vectors.copy()
    many[200:500] = many[200]
    many[200:500, 0] += np.float32(1e-8) * np.arange(300)
    held = build(kind, many, tmp_path)[1]
    own = np.array([250])
    truth = exact_neighbours(held.index, [many], many[own], own)
    assert truth.ids.shape == (1, 101)
    left_out = np.setdiff1d(np.arange(200, 500), np.r_[truth.ids[0], own])
    assert recall_of(left_out[None, :10], truth, held.index) == 1
    assert recall_of(np.r_[left_out[:4], np.arange(6)][None], truth, held.index) == pytest.approx(0.4)


@pytest.fixture(scope="module")
def shared(vectors):
    """The vectors, 300 rows of which share one and 60 another, spread over the file."""
    many = np.concatenate([vectors, vectors[[7]].repeat(299, 0), vectors[[9]].repeat(59, 0)])
    return many[np.random.default_rng(1).permutation(len(many))]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_a_vector_are_all_found(kind, vectors, shared, tmp_path, monkeypatch):
    """Against brute force over rows: top k, a filter, hidden rows, through each way of searching."""
    held = build(kind, shared, tmp_path)[1]
    assert held.index.ntotal == 700 and len(held) == 1058
    twins = np.flatnonzero((shared == vectors[7]).all(1))
    others = np.setdiff1d(np.arange(1058), twins)
    found = [row["_row"] for _, row in held.find(vectors[7], 305, {})]
    assert found[:300] == twins.tolist() and len(set(found)) == 305
    nearest = others[np.argmax(shared[others] @ vectors[7])]
    if "PCA" not in kind:
        assert np.array_equal(shared[found[300]], shared[nearest])
    assert [row["_row"] for _, row in held.find(vectors[7], 10, {})] == twins[:10].tolist()
    alone = [row["_row"] for _, row in held.find(vectors[7], 10, {}, distinct=True)]
    assert len(alone) == 10 and set(alone) & set(twins) == {twins[0]}
    if "PCA" not in kind:
        assert not set(search(held, like=f"id{twins[3]}", k=100, id_column="id").index) & set(twins)
    half = [int(row["id"][2:]) for _, row in held.find(vectors[7], 400, {"half": ["b"]})]
    assert set(twins[twins % 2 == 1].tolist()) <= set(half) and {i % 2 for i in half} == {1} and len(half) == 400
    monkeypatch.setattr("ebr_lib.index.opened.EXACT_ROWS", 10)
    through = [int(row["id"][2:]) for _, row in held.find(vectors[7], 400, {"half": ["b"]})]
    assert set(through[:100]) <= set(half) and len(through) == 400
    held.deleted = twins[1:]
    found = [row["_row"] for _, row in held.find(vectors[7], 1058, {})]
    assert found[0] == twins[0] and len(found) == len(held) == 1058 - 299
    held.deleted = twins
    assert not set(twins) & {row["_row"] for _, row in held.find(vectors[7], 200, {})}


def test_exact_neighbours_are_equal_from_the_index_and_from_batches(vectors, tmp_path):
    held = build("HNSW16", vectors, tmp_path)[1]
    own = np.arange(30)
    inside = exact_neighbours(held.index, iter(()), vectors[:30], own)
    compressed = build("SQ8", vectors, tmp_path)[1]
    stream = exact_neighbours(compressed.index, np.array_split(vectors, 5), vectors[:30], own)
    np.testing.assert_allclose(np.sort(inside.scores), np.sort(stream.scores), atol=1e-6)
    assert (inside.ids == stream.ids).mean() > 0.99


def test_recall_does_not_fall_with_a_higher_setting(vectors, tmp_path):
    plan, held = build("IVF8,Flat", vectors, tmp_path)
    truth = exact_neighbours(held.index, [vectors], vectors[:100], np.arange(100))
    recalls = [measure_point(held.index, truth, plan.knob, n).recall for n in (1, 4, 8)]
    assert recalls == sorted(recalls) and recalls[-1] == 1


@pytest.fixture
def gpu_work(monkeypatch):
    """Faiss as if it had a GPU, each index there being a copy on the CPU; how many vectors each search asked for."""
    import faiss

    asked = []

    class OnGpu(faiss.IndexFlat):
        def search(self, queries, k, **rest):
            asked.append(len(queries))
            return super().search(queries, k, **rest)

    def copied(index, co=None, ngpu=-1):
        copy = OnGpu(index.d, index.metric_type)
        if index.ntotal:
            copy.add(index.reconstruct_n(0, index.ntotal))
        return copy

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", copied)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", SimpleNamespace, raising=False)
    return asked


@pytest.mark.parametrize("kind", ["IVF8,Flat", "IVF8,SQ8", "PCA12,IVF8,Flat", "HNSW16", "Flat"])
def test_gpu_gives_the_same_index_and_neighbours(kind, vectors, tmp_path, gpu_work, monkeypatch):
    import faiss

    held = build(kind, vectors, tmp_path)[1]
    added_on_gpu = sum(gpu_work)
    assert added_on_gpu == (len(vectors) if kind.startswith("IVF") else 0)
    truth = exact_neighbours(held.index, np.array_split(vectors, 3), vectors[:40], np.arange(40))
    assert sum(gpu_work) > added_on_gpu
    monkeypatch.undo()
    alone = build(kind, vectors, tmp_path)[1]
    np.testing.assert_array_equal(faiss.serialize_index(held.index), faiss.serialize_index(alone.index))
    on_cpu = exact_neighbours(alone.index, np.array_split(vectors, 3), vectors[:40], np.arange(40))
    np.testing.assert_allclose(truth.scores, on_cpu.scores, atol=1e-6)
