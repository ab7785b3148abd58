"""Cluster numbers against scikit-learn, and against sums done by hand."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from ebr_lib.visualize import clusters as measure


def unit_vectors(n: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def labelled(n: int = 400, k: int = 7, dim: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around k centres, one label with a single row."""
    codes = np.random.default_rng(1).integers(0, k - 1, n)
    codes[0] = k - 1
    x = unit_vectors(n, dim) + 0.4 * unit_vectors(k, dim, seed=2)[codes]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), codes


def test_separation_equals_scikit_learn():
    from sklearn import metrics

    x, codes = labelled()
    exact = x.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    found = measure.separation(x, codes)
    expected = metrics.silhouette_samples(exact, codes, metric="cosine")
    np.testing.assert_allclose(found.per_row, expected, atol=1e-9)
    assert found.silhouette == pytest.approx(metrics.silhouette_score(exact, codes, metric="cosine"), abs=1e-9)
    assert found.davies_bouldin == pytest.approx(metrics.davies_bouldin_score(exact, codes), abs=1e-9)
    assert found.calinski_harabasz == pytest.approx(metrics.calinski_harabasz_score(exact, codes), rel=1e-9)


def test_separation_in_blocks_is_the_same(monkeypatch):
    x, codes = labelled()
    whole = measure.separation(x, codes)
    monkeypatch.setattr(measure, "BLOCK", 37)
    np.testing.assert_allclose(measure.separation(x, codes).per_row, whole.per_row, atol=1e-12)


def test_rows_without_a_label_do_not_count():
    x, codes = labelled()
    with_nulls = np.where(np.arange(len(codes)) % 3 == 1, -1, codes)
    found = measure.separation(x, with_nulls)
    kept = with_nulls >= 0
    assert found.silhouette == pytest.approx(measure.separation(x[kept], codes[kept]).silhouette, abs=1e-12)
    assert np.isnan(found.per_row[~kept]).all()


@pytest.mark.parametrize("codes", [[0, 0, 0], [0, 1, 2], [-1, -1, -1], [0, -1, -1]])
def test_separation_is_undefined_for_one_label_or_only_single_rows(codes):
    assert measure.separation(unit_vectors(3, 4), np.array(codes)) is None


@pytest.mark.parametrize("dim", [16, 384])
def test_labels_of_equal_vectors_are_not_separated_at_all(dim):
    x = np.repeat(unit_vectors(1, dim, seed=dim), 40, axis=0)
    codes = np.arange(40) % 3
    found = measure.separation(x, codes)
    near = np.array([[(i + 1) % 40] for i in range(40)])
    scores = measure.label_scores(codes, np.arange(40), measure.label_purity(near, codes), found)
    assert found.silhouette == 0 and [s.silhouette for s in scores] == [0, 0, 0]
    assert (found.davies_bouldin, found.calinski_harabasz) == (0, 1)  # as scikit-learn defines them


def test_equal_vectors_among_others_are_as_scikit_learn_has_them():
    from sklearn.metrics import silhouette_samples

    x = unit_vectors(30, 16)[np.arange(90) % 30]
    codes = np.arange(90) % 30 % 4
    exact = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    expected = silhouette_samples(exact, codes, metric="cosine")
    np.testing.assert_allclose(measure.separation(x, codes).per_row, expected, atol=1e-9)


def test_purity_by_hand():
    near = np.array([[1, 2], [0, 2], [1, 0], [2, 1]])
    codes = np.array([0, 0, 1, -1])
    found = measure.label_purity(near, codes, ks=(1, 2))
    assert found.at == {1: pytest.approx((1 + 1 + 0) / 3), 2: pytest.approx((0.5 + 0.5 + 0) / 3)}
    assert found.chance == pytest.approx(2 * 1 / (3 * 2)) and found.judged == 3
    # label 0 has one other row, so one neighbour is looked at; label 1 has none
    np.testing.assert_allclose(found.per_row, [1, 1, np.nan, np.nan])


def test_small_labels_that_lie_together_are_pure():
    """A label of three rows: ten neighbours cannot all have it, two can."""
    codes = np.repeat([0, 1], [3, 30])
    x = (np.eye(2, 8)[codes] + 0.05 * unit_vectors(33, 8)).astype(np.float32)
    near = np.argsort(-(x @ x.T) + 9 * np.eye(33), axis=1)[:, :10]
    found = measure.label_purity(near, codes)
    scores = {s.code: s.purity for s in measure.label_scores(codes, np.arange(33), found, None)}
    assert scores == {0: 1.0, 1: 1.0} and found.at[10] < 1


def test_purity_skips_neighbours_without_a_label():
    found = measure.label_purity(np.array([[2, 1], [2, 0], [0, 1]]), np.array([0, 0, -1]), ks=(1, 2))
    assert found.at[2] == 1.0
    assert np.isnan(found.at[1])  # the one neighbour has no label


def test_purity_of_noise_is_chance():
    rng = np.random.default_rng(0)
    codes = rng.choice(3, 4000, p=[0.7, 0.2, 0.1])
    near = rng.integers(0, 4000, (4000, 10))
    found = measure.label_purity(near, codes)
    assert found.at[10] == pytest.approx(found.chance, abs=0.01)


def test_label_scores_average_their_rows():
    x, codes = labelled()
    near = np.argsort(-(x @ x.T), axis=1)[:, 1:11]
    purity, separated = measure.label_purity(near, codes), measure.separation(x, codes)
    scores = measure.label_scores(codes, np.arange(len(codes)), purity, separated)
    assert [s.rows for s in scores] == sorted(np.bincount(codes), reverse=True)
    for score in scores:
        assert score.purity == pytest.approx(purity.per_row[codes == score.code].mean(), nan_ok=True)
        assert score.silhouette == pytest.approx(separated.per_row[codes == score.code].mean())


def test_confusions_by_hand():
    codes = np.repeat([0, 1, 2], 5)
    near = np.array([[5, 1]] * 5 + [[0, 1]] * 5 + [[11, 12]] * 5)
    x = unit_vectors(15, 4)
    x[5], x[2] = x[0], x[1]
    found = measure.confusions(x, near, codes)
    assert len(found) == 1
    pair = found[0]
    assert (pair.first, pair.second, pair.share, pair.share_back) == (1, 0, 1.0, 0.5)
    assert pair.example == (5, 0)  # equal vectors, one of each label


def test_labels_too_small_are_not_called_confused():
    codes = np.array([0] * 10 + [1])
    near = np.array([[10]] * 10 + [[0]])
    assert measure.confusions(unit_vectors(11, 4), near, codes) == []


def test_kmeans_finds_what_is_there_and_says_why():
    centres = np.eye(6, dtype=np.float32)
    truth = np.repeat(np.arange(6), 50)
    x = centres[truth] + 0.05 * unit_vectors(300, 6)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    chosen = measure.find_clusters(x, None, 0, seed=0)
    assert chosen.k == 6 and "silhouette" in chosen.why
    assert measure.agreement(chosen.codes, truth) == (pytest.approx(1), pytest.approx(1))
    assert measure.find_clusters(x, 3, 6, seed=0).k == 3
    assert "labels" in measure.find_clusters(x, None, 6, seed=0).why


def equal_vectors(n: int, distinct: int) -> np.ndarray:
    return unit_vectors(distinct, 8)[np.arange(n) % distinct]


@pytest.mark.parametrize(
    "vectors, k, labels, why",
    [
        ((10, 10), 50, 0, "50 were asked for; 10 vectors gave 9"),
        ((40, 6), 20, 3, "20 were asked for; 40 vectors gave 6"),
        ((40, 6), None, 20, "there are 20 labels; 40 vectors gave 6"),
        ((9, 9), None, 9, "there are 9 labels; 9 vectors gave 8"),
    ],
)
def test_fewer_clusters_than_wanted_are_warned_of_once(vectors, k, labels, why, caplog):
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        found = measure.find_clusters(equal_vectors(*vectors), k, labels, seed=0)
    assert found.why == why and why.endswith(f" {found.k}")
    assert [record.getMessage() for record in caplog.records] == [f"聚类 k-means: {why}"]


def test_as_many_clusters_as_wanted_need_no_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        measure.find_clusters(equal_vectors(40, 6), 6, 0, seed=0)
        measure.find_clusters(equal_vectors(40, 6), None, 1, seed=0)
    assert not caplog.records


@pytest.mark.parametrize("n", [1, 40])
def test_one_cluster_has_no_silhouette(n):
    assert np.isnan(measure.find_clusters(equal_vectors(n, 1), 1, 0, seed=0).silhouette)


def test_one_row_has_no_pairs():
    found = measure.health(unit_vectors(1, 4), np.ones(1), distinct=1)
    assert np.isnan([found.mean_cosine, found.near_pairs]).all() and not list(found.warnings())


def test_clusters_are_the_same_for_the_same_seed():
    x, _ = labelled()
    first, again = (measure.find_clusters(x, 5, 0, seed=3).codes for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_typical_rows_are_nearest_to_the_centre():
    x, _ = labelled()
    found = measure.find_clusters(x, 4, 0, seed=0, typical=1)
    rows = np.flatnonzero(found.codes == 0)
    centre = x[rows].mean(axis=0)
    assert found.typical[0] == (rows[(x[rows] @ centre).argmax()],)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_vectors_make_one_cluster_or_two(n):
    found = measure.find_clusters(unit_vectors(n, 4), None, 0, seed=0)
    assert len(found.codes) == n and sum(found.sizes) == n


def test_health_counts_what_is_wrong():
    x = unit_vectors(100, 16)
    x[50:] = x[0]
    found = measure.health(x, np.linspace(1, 3, 100), distinct=50, zero=2, without_vector=3, seed=0)
    assert (found.norm_min, found.norm_median, found.norm_max) == (0, 2, 3)
    assert (found.rows, found.without_vector, found.zero, found.repeated) == (105, 3, 2, 50)
    assert found.near_pairs == pytest.approx(51 * 50 / (100 * 99), abs=1e-3)
    products = x @ x.T
    assert found.mean_cosine == pytest.approx((products.sum() - 100) / 9900, abs=1e-5)
    said = " ".join(found.warnings())
    assert all(part in said for part in ("3 of 105", "2 vectors", "repeat another", "above 0.99"))


def test_collapsed_vectors_are_said_to_be_the_same():
    x = np.repeat(unit_vectors(1, 4), 9, axis=0)
    found = measure.health(x, np.ones(9), distinct=1)
    assert any("all 9 vectors are the same" in sentence for sentence in found.warnings())


def test_one_item_has_no_neighbours_to_share():
    none = np.empty((1, 0), np.int64)
    assert np.isnan(measure.neighbours_shared(none, none)).all()


def test_neighbours_shared_by_hand():
    before, after = np.array([[1, 2], [0, 2], [0, 1]]), np.array([[2, 1], [2, 3], [4, 5]])
    np.testing.assert_allclose(measure.neighbours_shared(before, after), [1, 0.5, 0])
