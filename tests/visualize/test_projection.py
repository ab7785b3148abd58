"""Neighbours, samples, maps and their trust, against brute force and scikit-learn."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from ebr_lib.visualize import projection


def unit_vectors(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def grouped(n: int, groups: int = 3, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Tight, well separated groups."""
    codes = np.arange(n) % groups
    x = 3 * np.eye(groups, dim, dtype=np.float32)[codes] + unit_vectors(n, dim)
    return x / np.linalg.norm(x, axis=1, keepdims=True), codes


# --- samples and duplicates ---------------------------------------------------------------------------------------


def test_sample_is_in_proportion_and_keeps_small_labels():
    codes = np.array([0] * 9000 + [1] * 900 + [2] * 30 + [3] * 5)
    rows = projection.sample_rows(codes, 1000, seed=0)
    assert len(rows) == len(set(rows.tolist())) == 1000 and (np.diff(rows) > 0).all()
    sizes = np.bincount(codes[rows])
    assert sizes[3] == 5 and sizes[2] >= 20
    assert sizes[0] / sizes[1] == pytest.approx(10, rel=0.3)


def test_sample_depends_on_the_seed_alone():
    codes = np.arange(500) % 7
    same, again, other = (projection.sample_rows(codes, 100, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(same, again)
    assert (same != other).any()


def test_sample_of_few_rows_is_all_of_them():
    np.testing.assert_array_equal(projection.sample_rows(np.zeros(5, int), 9, seed=0), np.arange(5))


def test_sample_with_more_labels_than_points():
    assert len(projection.sample_rows(np.arange(1000), 10, seed=0)) == 10


def test_distinct_rows_are_found_in_order():
    x = unit_vectors(4)
    rows = np.array([2, 0, 2, 3, 0, 1])
    first, place = projection.distinct_rows(x[rows] + np.float32(1e-8))
    np.testing.assert_array_equal(first, [0, 1, 3, 5])
    np.testing.assert_array_equal(place, [0, 1, 0, 2, 1, 3])


# --- neighbours ---------------------------------------------------------------------------------------------------


def test_neighbours_equal_brute_force(monkeypatch):
    monkeypatch.setattr(projection, "BLOCK", 64)
    x = unit_vectors(300)
    found = projection.exact_neighbours(x, 12)
    gaps = np.linalg.norm(x[:, None] - x[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    np.testing.assert_array_equal(found.indices, np.argsort(gaps, axis=1)[:, :12])
    np.testing.assert_allclose(found.distances, np.sort(gaps, axis=1)[:, :12], atol=1e-3)


def test_neighbours_are_at_most_all_others():
    assert projection.exact_neighbours(unit_vectors(4), 90).indices.shape == (4, 3)


def test_neighbours_never_name_the_row_itself():
    x = np.repeat(unit_vectors(2), 40, axis=0)  # among these equal products the row may not find itself
    found = projection.exact_neighbours(x, 5)
    assert (found.indices != np.arange(80)[:, None]).all()


def test_neighbours_of_rows_count_equal_rows_first():
    x = unit_vectors(30)
    rows = np.concatenate([np.arange(30), [0, 0, 7]])
    first, place = projection.distinct_rows(x[rows])
    near = projection.neighbours_of_rows(projection.exact_neighbours(x[first], 10), place, 6, seed=0)
    products = x[rows] @ x[rows].T
    np.fill_diagonal(products, -np.inf)
    assert set(near[0, :2]) == {30, 31} and near[7, 0] == 32 and near[32, 0] == 7
    expected = -np.sort(-products, axis=1)[:, :6]
    np.testing.assert_allclose(np.take_along_axis(products, near, 1), expected, atol=1e-6)
    assert (near != np.arange(33)[:, None]).all()


def test_neighbours_of_rows_where_all_are_equal():
    near = projection.neighbours_of_rows(
        projection.exact_neighbours(unit_vectors(1), 5), np.zeros(4, dtype=np.int64), 10, seed=0
    )
    assert near.shape == (4, 3)
    assert all(set(row) == set(range(4)) - {i} for i, row in enumerate(near))


def test_neighbours_of_rows_equal_brute_force_where_vectors_repeat():
    """Nearest first, no row twice, never itself; whichever of equal rows are named."""
    x = unit_vectors(25)
    rows = np.random.default_rng(3).integers(0, 25, 200)
    first, place = projection.distinct_rows(x[rows])
    near = projection.neighbours_of_rows(projection.exact_neighbours(x[rows][first], 30), place, 30, seed=1)
    products = x[rows] @ x[rows].T
    np.fill_diagonal(products, -np.inf)
    np.testing.assert_allclose(np.take_along_axis(products, near, 1), -np.sort(-products, axis=1)[:, :30], atol=1e-6)
    assert all(len(set(row)) == 30 for row in near) and (near != np.arange(200)[:, None]).all()


def test_the_order_of_the_file_does_not_decide_between_equal_rows():
    """Equal vectors in a file sorted by label: a label is as frequent among neighbours as chance has it."""
    codes = np.repeat([0, 1], [150, 50])
    alone = projection.exact_neighbours(unit_vectors(1), 5)
    near = projection.neighbours_of_rows(alone, np.zeros(200, dtype=np.int64), 10, seed=0)
    for code, others in ((0, 149 / 199), (1, 49 / 199)):
        assert (codes[near] == code)[codes == code].mean() == pytest.approx(others, abs=0.05)
    other, same = (projection.neighbours_of_rows(alone, np.zeros(200, dtype=np.int64), 10, seed) for seed in (1, 0))
    assert (near == same).all() and (near != other).any()


def test_which_equal_rows_are_neighbours_of_another_is_random():
    """A hundred rows whose nearest vector is that of two hundred others, 150 of one label before 50 of another."""
    nearest = projection.Neighbours(np.array([[100]] * 100 + [[0]], np.int32), np.zeros((101, 1), np.float32))
    place = np.concatenate([np.arange(100), np.full(200, 100)])
    near = projection.neighbours_of_rows(nearest, place, 10, seed=0)[:100]
    assert near.min() >= 100 and all(len(set(row)) == 10 for row in near)
    assert (near < 250).mean() == pytest.approx(0.75, abs=0.05)


# --- parameters ---------------------------------------------------------------------------------------------------


def test_perplexity_is_lowered_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        assert projection.fitting_perplexity(30, 1000) == 30
        assert not caplog.records
        assert projection.fitting_perplexity(30, 31) < 10
    assert "30 lowered to 9.9" in caplog.text


def test_neighbors_are_lowered_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        assert projection.fitting_neighbors(15, 16) == 15
        assert projection.fitting_neighbors(15, 7) == 6
    assert "15 neighbours lowered to 6" in caplog.text


# --- maps ---------------------------------------------------------------------------------------------------------


def test_pca_equals_scikit_learn_up_to_sign():
    from sklearn.decomposition import PCA

    x, _ = grouped(60)
    expected = PCA(2).fit_transform(x)
    np.testing.assert_allclose(np.abs(projection.pca_map(x)), np.abs(expected), atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_pca_of_few_points(n):
    found = projection.pca_map(unit_vectors(n))
    assert found.shape == (n, 2) and np.isfinite(found).all()


def tsne(x, **changes):
    given = {"perplexity": 10.0, "learning_rate": "auto", "seed": 0} | changes
    return projection.tsne_map(projection.exact_neighbours(x, 30), projection.pca_map(x), **given)


def umap(x, **changes):
    given = {"n_neighbors": 10, "min_dist": 0.1, "seed": 0} | changes
    return projection.umap_map(projection.exact_neighbours(x, 30), projection.pca_map(x), **given)


def test_tsne_of_many_points_repeats_bit_for_bit(monkeypatch):
    monkeypatch.setattr(projection, "FFT_FROM", 100)
    monkeypatch.setattr(projection, "STEPS", ((30, 12.0, 0.5), (30, 1.0, 0.8)))
    x, codes = grouped(150)
    coords = tsne(x)
    near = projection._near_on_map(coords, np.arange(150), 5)
    assert (codes[near] == codes[:, None]).mean() > 0.95
    np.testing.assert_array_equal(coords, tsne(x))


@pytest.mark.parametrize(
    ("draw", "changes"),
    [
        (tsne, [{"perplexity": 5.0}, {"learning_rate": 50.0}]),
        (umap, [{"n_neighbors": 4}, {"min_dist": 0.7}, {"seed": 5}]),
    ],
)
def test_maps_keep_groups_apart_repeat_bit_for_bit_and_follow_their_settings(draw, changes):
    x, codes = grouped(90)
    coords = draw(x)
    assert coords.shape == (90, 2) and coords.dtype == np.float32
    near = projection._near_on_map(coords, np.arange(90), 5)
    assert (codes[near] == codes[:, None]).mean() > 0.95
    np.testing.assert_array_equal(coords, draw(x))
    assert all((draw(x, **change) != coords).any() for change in changes)


def test_a_umap_map_leaves_the_number_of_threads_as_it_was(monkeypatch):
    """numba's first run sets OpenMP of the whole process to one thread per processor."""
    from umap import UMAP

    def greedy(self, start):
        torch.set_num_threads(before + 1)
        return start

    before = torch.get_num_threads()
    monkeypatch.setattr(UMAP, "fit_transform", greedy)
    umap(grouped(60)[0])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("block", [100, 4096])
def test_neighbours_in_principal_components(monkeypatch, block):
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    monkeypatch.setattr(projection, "BLOCK", block)
    monkeypatch.setattr(projection, "COMPONENTS", 5)
    x, _ = grouped(400)
    found = projection.component_neighbours(x, 60)  # more than the nearest lists of an inverted file may hold
    expected = NearestNeighbors(n_neighbors=60).fit(z := PCA(5).fit_transform(x)).kneighbors()[0]
    apart = np.linalg.norm(z[:, None] - z[found.indices], axis=2)
    np.testing.assert_allclose(found.distances, apart, atol=1e-4)
    assert (np.abs(found.distances - expected) < 1e-4).mean() > (0.9 if block == 100 else 0.999)
    assert (found.indices != np.arange(400)[:, None]).all()


@pytest.mark.parametrize("dim", [16, 384])
@pytest.mark.parametrize("n", [5, 8, 12, 30])
def test_few_vectors_are_not_drawn_as_one_dot(n, dim):
    """Far apart, all at equal distances: t-SNE draws a map, and one as true as PCA's."""
    from sklearn.manifold import trustworthiness

    lost = []
    for seed in range(3):
        x = unit_vectors(n, dim, seed)
        maps = {
            "tsne": tsne(x, perplexity=projection.fitting_perplexity(30, n), seed=seed),
            "pca": projection.pca_map(x),
        }
        assert np.ptp(maps["tsne"], axis=0).min() > 1e-3
        trust = {name: trustworthiness(x, coords, n_neighbors=(n - 1) // 2) for name, coords in maps.items()}
        lost.append(trust["pca"] - trust["tsne"])
    assert np.mean(lost) < (0.12 if n >= projection.FEWEST else 0.25)


def test_the_rest_is_placed_among_its_neighbours():
    x, codes = grouped(300)
    drawn, rest = np.arange(0, 200), np.arange(200, 300)
    coords = np.stack([codes[drawn] * 10.0, np.zeros(200)], axis=1).astype(np.float32)
    placed = projection.place_rest(x, rest, x[drawn], coords)
    np.testing.assert_allclose(placed[:, 0], codes[rest] * 10.0, atol=3)


def test_many_are_placed_by_an_inverted_file(monkeypatch):
    monkeypatch.setattr(projection, "BLOCK", 100)
    x, codes = grouped(700)
    coords = np.stack([codes[:600] * 10.0, np.zeros(600)], axis=1).astype(np.float32)
    placed = projection.place_rest(x, np.arange(600, 700), x[:600], coords)
    assert (np.rint(placed[:, 0] / 10) == codes[600:]).mean() > 0.95


def test_alignment_undoes_a_turn_a_mirror_and_a_shift():
    onto = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    turned = onto @ np.array([[0, -3], [-3, 0]], dtype=np.float32) + 7
    np.testing.assert_allclose(projection.aligned(turned, onto), onto, atol=1e-4)


# --- trust --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 15])
def test_trustworthiness_equals_scikit_learn(k):
    from sklearn.manifold import trustworthiness

    x = unit_vectors(200)
    coords = x[:, :2] + 0.1
    assert projection.trustworthiness(x, coords, k) == pytest.approx(
        trustworthiness(x.astype(np.float64), coords, n_neighbors=k), abs=1e-9
    )


def test_quality_of_a_perfect_map_and_of_noise():
    flat = np.zeros((200, 8), dtype=np.float32)
    angle = np.linspace(0, 1.2, 200)
    flat[:, 0], flat[:, 1] = np.cos(angle), np.sin(angle)
    neighbours = projection.exact_neighbours(flat, 15)
    perfect = projection.map_quality(flat, neighbours, flat[:, :2], seed=0)
    assert perfect.trustworthiness > 0.999 and perfect.neighbours_kept > 0.95
    noise = projection.map_quality(flat, neighbours, unit_vectors(200, 2), seed=0)
    assert noise.trustworthiness < 0.7 and noise.neighbours_kept < 0.2


def test_a_map_of_too_few_points_cannot_be_judged():
    x = unit_vectors(2)
    found = projection.map_quality(x, projection.exact_neighbours(x, 15), projection.pca_map(x), seed=0)
    assert np.isnan([found.trustworthiness, found.neighbours_kept]).all() and found.neighbours == 0


def test_quality_is_judged_on_a_sample(monkeypatch):
    monkeypatch.setattr(projection, "JUDGED", 50)
    x = unit_vectors(200)
    found = projection.map_quality(x, projection.exact_neighbours(x, 15), projection.pca_map(x), seed=0)
    assert found.points == 50 and 0 < found.trustworthiness < 1


# --- cache --------------------------------------------------------------------------------------------------------


def test_cache_computes_once_and_drops_what_is_not_used(tmp_path):
    made = []

    def make():
        made.append(1)
        return np.arange(3)

    path = tmp_path / "maps.npz"
    for _ in range(2):
        cache = projection.Cache(path)
        np.testing.assert_array_equal(cache.get("a", make), np.arange(3))
        cache.save()
    assert made == [1]
    other = projection.Cache(path)
    other.get("b", make)
    other.save()
    projection.Cache(path).get("a", make)
    assert len(made) == 3


def test_a_broken_cache_is_computed_again(tmp_path, caplog):
    path = tmp_path / "maps.npz"
    path.write_bytes(b"PK broken")
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        cache = projection.Cache(path)
    assert "computing the maps again" in caplog.text
    cache.get("a", lambda: np.zeros(1))
    cache.save()
    assert list(np.load(path)) == ["a"]


def test_vectors_and_settings_change_the_fingerprint():
    x = unit_vectors(5)
    names = {projection.fingerprint(*given) for given in ((x, 1), (x, 2), (x[:4], 1), (x + 1, 1), (x.T.copy(), 1))}
    assert len(names) == 5 and projection.fingerprint(x.copy(), 1) in names
