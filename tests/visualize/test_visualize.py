"""The stage end to end on small files: what it writes, what each knob does, and odd data."""

from __future__ import annotations

import base64
import json
import logging
import re

import numpy as np
import pytest

from ebr_lib import VisConfig, visualize_embeddings
from ebr_lib.data.embeddings.files import write_embeddings
from ebr_lib.errors import ConfigError, DataError, MissingError
from ebr_lib.knobs.flags import from_flags
from ebr_lib.tables import as_text
from ebr_lib.visualize import explorer, figure, fonts, projection
from ebr_lib.visualize import run as visualize
from ebr_lib.visualize import summary as numbers

DRAW = figure.draw
LABELS = ["书籍", "热水器", "shoes"]


def vectors(n: int = 60, dim: int = 12, seed: int = 0, apart: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)) + apart * np.eye(len(LABELS), dim)[np.arange(n) % len(LABELS)] * np.sqrt(dim)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def write(path, x=None, **columns):
    x = vectors() if x is None else x
    given = {
        "id": [f"{i:03}" for i in range(len(x))],
        "category": [LABELS[i % len(LABELS)] for i in range(len(x))],
        "description": [f"第{i}条 text" for i in range(len(x))],
    } | columns
    return str(write_embeddings(path, given, x))


@pytest.fixture
def see(tmp_path):
    """A function that runs the stage on a small file, with a map that costs nothing."""

    def run(path=None, **knobs):
        path = path or write(tmp_path / "embeds.txt")
        given = {"embedding_path": path, "output_path": str(tmp_path / "out" / "scatter.png"), "method": "tsne"}
        return visualize_embeddings(given | {"label_column": "category", "explorer": False} | knobs)

    return run


def numbers_of(result) -> dict:
    return {name: entry["value"] for name, entry in result.numbers["numbers"].items()}


def records(table) -> list[tuple]:
    return list(table.itertuples(index=False, name=None))


@pytest.fixture
def no_maps(monkeypatch):
    """Maps that cost nothing, and count how often they are drawn."""
    drawn = []

    def draw(name):
        def make(*given, **settings):
            drawn.append((name, settings))
            return given[-1].astype(np.float32)

        return make

    monkeypatch.setattr(projection, "tsne_map", draw("tsne"))
    monkeypatch.setattr(projection, "umap_map", draw("umap"))
    return drawn


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    """What the picture is given: panels, groups, title, caption. Drawing takes most of a run: see `draws`."""
    given = {}

    def record(path, panels, groups, **words):
        given.update(panels=panels, groups=groups, **words)
        path.write_bytes(b"picture")

    monkeypatch.setattr(figure, "draw", record)
    return given


@pytest.fixture
def draws(seen, monkeypatch):
    monkeypatch.setattr(figure, "draw", DRAW)


def rows_of(texts) -> list[int]:
    """The rows of the file that these texts are from."""
    return [int(re.match(r"第(\d+)条", text)[1]) for text in texts]


def nearest(x, rows, k=10) -> np.ndarray:
    """By brute force: the k nearest of each of these rows among them, as places in `rows`."""
    products = x[rows].astype(np.float64) @ x[rows].T.astype(np.float64)
    np.fill_diagonal(products, -np.inf)
    return np.argsort(-products, axis=1)[:, :k]


# --- what it writes -----------------------------------------------------------------------------------------------


def test_everything_is_written_and_the_numbers_are_right(see, no_maps, draws, caplog):
    with caplog.at_level(logging.INFO, logger="ebr_lib"):
        result = see(method="both", explorer=True)
    assert result.picture.read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in result.picture.parent.iterdir()) == [
        "scatter.html", "scatter.json", "scatter.maps.npz", "scatter.parquet", "scatter.png", "scatter.yaml",
    ]  # fmt: skip
    found = json.loads(result.numbers_path.read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(result.numbers))
    assert set(found["maps"]) == {"tsne", "umap"} and found["groups"]["sizes"] == dict.fromkeys(sorted(LABELS), 20)
    numbers = numbers_of(result)
    assert numbers["same label @1"] == numbers["ARI"] == 1.0
    assert numbers["chance"] == pytest.approx(3 * 20 * 19 / (60 * 59))
    from sklearn.metrics import silhouette_score

    expected = silhouette_score(vectors().astype(np.float64), [i % 3 for i in range(60)], metric="cosine")
    assert numbers["silhouette"] == pytest.approx(expected, abs=1e-6)
    assert "silhouette" in caplog.text and "wrote" in caplog.text
    shown = result._repr_html_()
    assert "data:image/png;base64," in shown and "scatter.html" in shown and "热水器" in shown


def test_the_health_of_the_vectors_comes_first(see, no_maps):
    assert see().tables["numbers"]["number"].tolist()[:5] == [
        "shortest vector",
        "longest vector",
        "repeated vectors",
        "pairs above 0.99",
        "mean cosine",
    ]


def test_every_number_has_a_meaning_and_a_direction(see, no_maps):
    for entry in see().numbers["numbers"].values():
        assert entry["meaning"] and entry["better"] in ("higher", "lower", "")


def test_the_three_formats_draw_alike(see, tmp_path, no_maps):
    pictures = [see(write(tmp_path / f"embeds{end}")) for end in (".txt", ".parquet", ".npy")]
    assert len({json.dumps(p.numbers["numbers"]) for p in pictures}) == 1


def test_the_page_holds_the_nearest_of_the_original_space(see, no_maps, monkeypatch):
    """A page of 20 of 30 projected of 60 rows: labels, neighbours and cosines are those of the rows that are drawn."""
    monkeypatch.setattr(explorer, "MOST", 20)
    page = see(max_points=30, explorer=True).explorer.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    labels, texts = data["columns"][data["colour"]], data["columns"][data["text"]]
    rows = rows_of(texts["texts"])
    assert len(rows) == len(set(rows)) == 20 and data["all"] == 60

    def unpacked(name, kind, where=data):
        return np.frombuffer(base64.b64decode(where[name]), kind)

    assert [labels["labels"][code] for code in unpacked("codes", "<i4", labels)] == [LABELS[row % 3] for row in rows]
    (space,) = data["spaces"]
    near = unpacked("near", "<i4", space).reshape(20, 10)
    np.testing.assert_array_equal(near, nearest(vectors(), rows))
    x = vectors()[rows].astype(np.float64)
    cosines = unpacked("cosines", "<i2", space).reshape(20, 10) / 10_000
    np.testing.assert_allclose(cosines, np.take_along_axis(x @ x.T, near, 1), atol=1e-4)


def test_the_page_of_a_pair_holds_both_spaces(see, tmp_path, no_maps):
    base = vectors(seed=5, apart=0.2)
    page = see(compare_path=write(tmp_path / "base.txt", base), explorer=True).explorer.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [(each["name"], each["space"]) for each in data["maps"]] == [("t-SNE: before", 0), ("t-SNE: after", 1)]
    for space, x in zip(data["spaces"], (base, vectors()), strict=True):
        near = np.frombuffer(base64.b64decode(space["near"]), "<i4").reshape(60, 10)
        np.testing.assert_array_equal(near, nearest(x, np.arange(60)))


def test_each_map_says_how_far_it_can_be_trusted(see, seen):
    from sklearn.manifold import trustworthiness

    see()
    (panel,) = seen["panels"]
    near, drawn = nearest(vectors(), np.arange(60), 15), panel.coords.astype(np.float64)
    gaps = np.linalg.norm(drawn[:, None] - drawn[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    kept = np.mean([np.isin(a, b).mean() for a, b in zip(np.argsort(gaps, axis=1)[:, :15], near, strict=True)])
    trusted = trustworthiness(vectors().astype(np.float64), drawn, n_neighbors=15)
    assert panel.note == f"trustworthiness {trusted:.3f}, neighbours kept {kept:.1%}"


def test_confused_labels_come_with_the_texts_that_are_nearest(see, tmp_path, no_maps):
    x = vectors(apart=0.5)
    table = see(write(tmp_path / "mixed.txt", x)).tables["confusions"]
    codes, near = np.arange(60) % 3, nearest(x, np.arange(60))
    assert len(table) == 3
    for first, second, share, back, *texts in records(table):
        a, b = LABELS.index(first), LABELS.index(second)
        assert share == pytest.approx((codes[near[codes == a]] == b).mean())
        assert back == pytest.approx((codes[near[codes == b]] == a).mean())
        one, other = rows_of(texts)
        assert (codes[one], codes[other]) == (a, b)
        assert x[one] @ x[other] == pytest.approx((x[codes == a] @ x[codes == b].T).max())


def test_the_caption_says_what_is_drawn(see, tmp_path, no_maps, seen):
    result = see(max_points=30, seed=7)
    numbers = numbers_of(result)
    assert "30 of 60 vectors were projected (sampled by category, seed 7)" in seen["caption"]
    assert "the rest lie where their nearest projected neighbours do" in seen["caption"]
    for name in ("same label @1", "same label @10", "chance", "silhouette"):
        assert f"{name} {numbers[name]:.3f}" in seen["caption"]
    assert f"chance {numbers['chance']:.3f} (of 30 rows), silhouette {numbers['silhouette']:.3f}, " in seen["caption"]
    assert "not drawn" not in seen["caption"] and "grey" not in seen["caption"]
    x = vectors()
    x[5] = 0
    valid = np.arange(60) % 10 != 0
    columns = {"category": [None if i % 7 == 1 else LABELS[i % 3] for i in range(60)], "description": ["text"] * 60}
    see(str(write_embeddings(tmp_path / "gaps.txt", columns, x, valid)), seed=8)
    assert "All 53 vectors were projected (seed 8)." in seen["caption"]
    assert "6 rows without a vector are not drawn. 1 rows with a vector of zeros are not drawn." in seen["caption"]
    without = sum(1 for i in range(60) if i % 7 == 1 and i % 10 and i != 5)
    assert f"{without} rows without category are grey." in seen["caption"]


@pytest.mark.usefixtures("no_maps")
@pytest.mark.parametrize("n, k", [(3, 1), (5, 2), (20, 9), (60, 15)])
def test_a_map_is_judged_by_as_many_neighbours_as_the_caption_says(see, tmp_path, seen, n, k):
    result = see(write(tmp_path / "few.txt", vectors(n)))
    meaning = f"share of the {k} nearest in the original space that are among the {k} nearest on the map"
    assert f"Neighbours kept: {meaning}." in seen["caption"]
    assert result.numbers["meanings"]["neighbours kept"]["meaning"] == meaning
    assert result.numbers["maps"]["tsne"]["neighbours"] == k
    (panel,) = seen["panels"]
    gaps = np.linalg.norm(panel.coords[:, None] - panel.coords[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    there = np.argsort(gaps, axis=1)[:, :k]
    kept = np.mean([np.isin(a, b).mean() for a, b in zip(there, nearest(vectors(n), np.arange(n), k), strict=True)])
    assert result.numbers["maps"]["tsne"]["neighbours_kept"] == pytest.approx(kept)


def test_scores_do_not_depend_on_lengths_and_say_so(see, tmp_path, no_maps):
    x = vectors()
    path = write(tmp_path / "long.txt", x * np.linspace(0.1, 9, 60, dtype=np.float32)[:, None])
    of_long, of_unit = (run.numbers["numbers"] for run in (see(path), see(write(tmp_path / "unit.txt", x))))
    for name in ("Davies-Bouldin", "Calinski-Harabasz"):
        assert of_long[name]["value"] == pytest.approx(of_unit[name]["value"], rel=1e-4)
        assert "of vectors brought to length 1" in of_long[name]["meaning"]


def test_the_columns_of_all_tables_are_explained(see, tmp_path, no_maps):
    result = see(compare_path=write(tmp_path / "base.txt", vectors(apart=0.2)))
    explained = result.tables["meanings"]
    assert set(explained["column"]) == set(result.numbers["meanings"]) >= {
        "trustworthiness", "neighbours kept", "purity", "silhouette", "share of its neighbours", "and back",
    }  # fmt: skip
    assert all(better in ("higher", "lower", "") and meaning for _, better, meaning in records(explained))


@pytest.mark.usefixtures("no_maps", "draws")
@pytest.mark.parametrize("end, start", [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_other_kinds_of_picture(see, tmp_path, end, start):
    latin = write(tmp_path / "latin.txt", category=["a", "b", "c"] * 20)  # a Chinese font takes long to embed
    results = [see(latin, output_path=str(tmp_path / f"{i}" / f"picture{end}")) for i in range(2)]
    first, again = (result.picture.read_bytes() for result in results)
    assert first.startswith(start) and first == again
    shown = results[0]._repr_html_()
    assert ("data:image/" in shown) != (end == ".pdf") and ("picture.pdf" in shown) == (end == ".pdf")


@pytest.mark.parametrize("name", ["x.json", "x.html", "x", "x.jpg", "x.yaml"])
def test_the_picture_is_not_named_like_what_lies_beside_it(name):
    with pytest.raises(ConfigError, match=r"output_path.*\.png, \.svg or \.pdf"):
        VisConfig(output_path=name)


def test_the_config_lies_beside_the_picture_and_repeats_the_run(see, no_maps):
    first = see(seed=9, clusters=4)
    again = visualize_embeddings({"preset": str(first.picture.with_suffix(".yaml"))})
    assert again.numbers == first.numbers


# --- knobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, expected", [("both", ["tsne", "umap"]), ("tsne", ["tsne"]), ("umap", ["umap"])])
def test_method_chooses_the_maps(see, no_maps, method, expected):
    result = see(method=method)
    assert [name for name, _ in no_maps] == list(result.numbers["maps"]) == expected


def test_parameters_reach_the_maps(see, no_maps):
    see(method="both", tsne_perplexity=7.0, tsne_learning_rate=99.0, umap_neighbors=6, umap_min_dist=0.4, seed=8)
    assert dict(no_maps) == {
        "tsne": {"perplexity": 7.0, "learning_rate": 99.0, "seed": 8},
        "umap": {"n_neighbors": 6, "min_dist": 0.4, "seed": 8},
    }


def test_fast_gives_up_the_seed_and_the_cache(see, no_maps):
    for _ in range(2):
        result = see(method="umap", fast=True)
    assert [settings["seed"] for _, settings in no_maps] == [None, None]
    assert not result.picture.with_suffix(".maps.npz").exists()


def test_without_a_label_column_clusters_colour_the_picture(see, no_maps):
    result = see(label_column=None, clusters=4)
    assert result.numbers["groups"]["by"] == "k-means cluster" and len(result.numbers["groups"]["sizes"]) == 4
    assert "same label @1" not in numbers_of(result) and "k-means silhouette" in numbers_of(result)


def test_clusters_are_given_or_as_many_as_labels(see, no_maps):
    assert "5 clusters (as given)" in see(clusters=5).tables["clusters"].attrs["title"]
    assert "3 clusters (as many as labels)" in see().tables["clusters"].attrs["title"]


@pytest.mark.parametrize("column, start", [(None, "第"), ("id", "0"), ("category", "书热s")])
def test_tables_show_the_text_column(see, no_maps, column, start):
    shown = see(text_column=column).tables["clusters"]["typical text"][0]
    assert shown[0] in start


def test_typical_texts_are_whole_in_the_file_and_short_on_the_screen(see, no_maps, tmp_path):
    texts = [f"第{i}条 " + "长" * 100 for i in range(60)]
    result = see(write(tmp_path / "long.txt", description=texts), clusters=3)
    tables = json.loads((tmp_path / "out" / "scatter.json").read_text(encoding="utf-8"))["tables"]
    (clusters,) = [table for table in tables if table["title"].startswith("k-means")]
    typical = [[row[name] for name in ("typical text", "second", "third")] for row in clusters["rows"]]
    assert len(typical) == 3 and all(len(set(row)) == 3 and set(row) <= set(texts) for row in typical)
    assert "长" * 20 not in as_text(result.tables["clusters"])


def test_fewer_typical_texts_than_places_leave_them_empty(see, no_maps, tmp_path):
    same = see(write(tmp_path / "same.txt", description=["一样"] * 60), clusters=3)
    assert [row[2:] for row in records(same.tables["clusters"])] == [("", "一样", "", "")] * 3


def test_max_points_are_projected_and_the_rest_placed(see, no_maps):
    result = see(max_points=30)
    assert (result.numbers["projected"], result.numbers["rows"]) == (30, 60)
    assert numbers_of(result)["silhouette"] == numbers_of(see())["silhouette"]  # on all rows, sample or not
    rows = {name: entry["rows"] for name, entry in result.numbers["numbers"].items()}
    assert rows["same label @1"] == 30 and rows["silhouette"] == rows["k-means silhouette"] == 60
    assert dict(result.tables["numbers"][["number", "rows"]].to_numpy()) == rows
    assert "among the 30 projected rows" in result.tables["labels"].attrs["title"]


def test_explorer_can_be_left_out(see, no_maps):
    assert see().explorer is None
    assert see(explorer=True).explorer.is_file()


def test_absent_fonts_that_the_user_named_are_warned_of_once(see, no_maps, draws, caplog):
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        see()
        assert "chinese_fonts" not in caplog.text  # the default names the fonts of every system
        see(chinese_fonts=["No Such Font", "nowhere.ttf", "SimHei"])
    assert caplog.text.count("chinese_fonts") == caplog.text.count("no font No Such Font, nowhere.ttf here") == 1


def test_chinese_fonts_reach_the_picture(see, no_maps, draws, monkeypatch):
    asked = []
    monkeypatch.setattr(figure, "fonts_for", lambda text, wanted: asked.append(wanted) or [fonts.LATIN])
    see(chinese_fonts=["My Font"])
    assert asked == [("My Font",)]


def test_recolouring_reuses_the_cached_map(see, no_maps):
    see()
    see(label_column="id")
    assert len(no_maps) == 1
    see(tsne_perplexity=5.0)
    assert len(no_maps) == 2
    see(tsne_perplexity=5.0, cache=False)
    assert len(no_maps) == 3


def test_recolouring_a_sample_reuses_the_cached_map(see, no_maps, seen, tmp_path):
    """The sample is by label; the next one is shown on the same rows, and the caption says by what they were chosen."""
    x = vectors()
    path = write(tmp_path / "two.txt", x, shop=["A"] * 50 + ["B"] * 10)
    first = see(path, max_points=30)
    again = see(path, max_points=30, label_column="shop")
    assert len(no_maps) == 1 and "sampled by category" in seen["caption"]
    assert first.numbers["maps"] == again.numbers["maps"]
    see(path, max_points=20, label_column="shop")
    assert len(no_maps) == 2 and "20 of 60 vectors were projected (sampled by shop," in seen["caption"]
    see(path, max_points=30, label_column="shop", cache=False)
    assert len(no_maps) == 3 and "sampled by shop" in seen["caption"]


# --- before and after ---------------------------------------------------------------------------------------------


def test_before_and_after_are_drawn_as_a_pair(see, tmp_path):
    before = write(tmp_path / "base.txt", vectors(apart=0.2))
    result = see(compare_path=before)
    table = result.tables["numbers"]
    assert list(table)[:4] == ["number", "before", "after", "change"]
    assert set(table["rows"]) == {60}  # rows that a number is from
    change = table.set_index("number")["change"]
    assert change["same label @1"] > 0.3 and change["silhouette"] > 0.1
    assert result.numbers["before"]["silhouette"]["value"] < result.numbers["numbers"]["silhouette"]["value"]
    shares = result.tables["moved"].iloc[:, 1].tolist()
    assert len(shares) == 10 and shares == sorted(shares) and shares[0] < 0.5


def test_equal_files_show_no_change(see, tmp_path, no_maps):
    result = see(compare_path=write(tmp_path / "base.txt"))
    assert (result.tables["numbers"]["change"] == 0).all()
    assert "100% are still there" in result.tables["moved"].attrs["title"]


def test_the_pair_lies_in_one_frame(see, tmp_path, seen, monkeypatch):
    """A map that comes out turned, mirrored, shifted and of another size is brought back onto the one of before."""
    turns = iter([np.eye(2), np.array([[0, -3], [-3, 0]])])
    monkeypatch.setattr(projection, "tsne_map", lambda near, start, **_: (start @ next(turns) + 7).astype(np.float32))
    see(compare_path=write(tmp_path / "base.parquet"), cache=False)
    before, after = seen["panels"]
    assert (before.title, after.title) == ("t-SNE: before", "t-SNE: after")
    np.testing.assert_allclose(after.coords, before.coords, atol=1e-4)


def test_both_sides_are_in_the_tables_the_json_and_the_caption(see, tmp_path, no_maps, seen):
    base = vectors(apart=0.5)
    alone = see(write(tmp_path / "base.txt", base))
    result = see(compare_path=str(tmp_path / "base.txt"))
    assert result.tables["maps"]["map"].tolist() == ["t-SNE: before", "t-SNE: after"]
    assert result.numbers["maps_before"]["tsne"]["points"] == 60
    scores = result.tables["labels"]
    assert list(scores) == [
        "label", "rows", "purity before", "purity after", "silhouette before", "silhouette after",
    ]  # fmt: skip
    codes = np.arange(60) % 3
    for label, _, *values in records(scores):
        mine = codes == LABELS.index(label)
        for purity, x in zip(values[:2], (base, vectors()), strict=True):
            assert purity == pytest.approx(
                (codes[nearest(x, np.arange(60))] == codes[:, None]).mean(axis=1)[mine].mean()
            )
    assert any(table["title"] == "Labels (category)" for table in result.numbers["tables"])
    then, now = numbers_of(alone)["silhouette"], numbers_of(result)["silhouette"]
    assert (
        "before → after: same label @1 " in seen["caption"] and f"silhouette {then:.3f} → {now:.3f}" in seen["caption"]
    )


def test_of_equal_changes_the_farthest_comes_first(see, tmp_path, no_maps):
    base, x = vectors(seed=5, apart=0.0), vectors(apart=0.0)
    table = see(write(tmp_path / "a.txt", x), compare_path=write(tmp_path / "base.txt", base)).tables["moved"]
    old, new = nearest(base, np.arange(60)), nearest(x, np.arange(60))
    shared = np.array([np.isin(a, b).mean() for a, b in zip(old, new, strict=True)])
    apart = np.einsum("id,ikd->ik", x, x[old]).mean(axis=1)
    order = np.lexsort((apart, shared))[:10]
    assert rows_of(table["item"]) == order.tolist() and len(set(shared[order])) < 10
    np.testing.assert_allclose(table.iloc[:, 1:3], np.c_[shared, apart][order], atol=1e-5)
    assert rows_of(table["nearest before"]) == old[order, 0].tolist()
    assert rows_of(table["nearest after"]) == new[order, 0].tolist()


def test_a_warning_about_vectors_names_the_file(see, tmp_path, no_maps, caplog):
    x = vectors()[np.arange(60) % 20]
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        see(compare_path=write(tmp_path / "base.txt", x))
    assert f"{tmp_path / 'base.txt'}: 40 of 60 vectors repeat another" in caplog.text


def test_rows_in_another_order_are_refused(see, tmp_path, no_maps, caplog):
    order = np.random.default_rng(0).permutation(60)
    order[[0, 1]] = sorted(order[[0, 1]])
    columns = {"id": [f"{i:03}" for i in order], "description": [f"第{i}条 text" for i in order]}
    shuffled = str(write_embeddings(tmp_path / "shuffled.txt", columns, vectors()[order]))
    wrong = int((order != np.arange(60)).argmax())
    with pytest.raises(
        DataError,
        match=rf"description in \d+ rows. Row {wrong}: '第{wrong}条.*' here, '第{order[wrong]}条.*there.*id_column",
    ):
        see(compare_path=shuffled)
    assert (see(compare_path=shuffled, id_column="id").tables["numbers"]["change"] == 0).all()
    ids = str(write_embeddings(tmp_path / "ids.txt", {"id": columns["id"]}, vectors()[order]))
    with pytest.raises(
        DataError, match=rf"differ in id in .*Row {wrong}: '{wrong:03}' here, '{order[wrong]:03}' there"
    ):
        see(compare_path=ids)  # no text in the old file: any column that both have will do
    nothing = tmp_path / "bare.npy"
    np.save(nothing, vectors())
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        see(compare_path=str(nothing))
    assert "shares no column" in caplog.text and "by their order" in caplog.text


def test_one_item_in_common(see, tmp_path, no_maps):
    result = see(write(tmp_path / "a.txt", vectors(1)), compare_path=write(tmp_path / "b.txt", vectors(1, seed=3)))
    assert result.picture.is_file() and "moved" not in result.tables


def test_items_are_matched_by_id(see, tmp_path, no_maps, caplog):
    order = np.random.default_rng(0).permutation(60)[:50]
    before = write(tmp_path / "base.txt", vectors()[order], id=[f"{i:03}" for i in order])
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        result = see(compare_path=before, id_column="id")
    assert "50 of 60" in caplog.text and result.numbers["rows"] == 50
    assert (result.tables["numbers"]["change"] == 0).all()


@pytest.mark.usefixtures("no_maps")
@pytest.mark.parametrize(
    "old, new", [(range(60), range(10, 60)), (range(15, 60), range(60)), (range(50), range(5, 60))]
)
def test_items_of_one_file_alone_are_counted(see, tmp_path, seen, old, new):
    def of(name, rows):
        rows = list(rows)
        columns = {"id": [f"{i:03}" for i in rows], "category": [LABELS[i % 3] for i in rows]}
        return write(tmp_path / name, vectors()[rows], **columns)

    result = see(of("new.txt", new), compare_path=of("old.txt", old), id_column="id")
    both = set(old) & set(new)
    assert f"{len(both)} of 60 items are in both files." in seen["caption"]
    found = result.numbers
    assert (found["rows"], found["unmatched"], found["unmatched_before"]) == (
        len(both), len(set(new) - both), len(set(old) - both),
    )  # fmt: skip


@pytest.mark.parametrize("key", [None, "id"])
def test_rows_without_a_vector_in_the_old_file_are_counted(see, tmp_path, no_maps, seen, key):
    columns = {"id": [f"{i:03}" for i in range(60)], "description": [f"第{i}条 text" for i in range(60)]}
    x = vectors()
    x[7] = 0
    old = str(write_embeddings(tmp_path / "gaps.txt", columns, x, np.arange(60) % 20 != 0))
    result = see(compare_path=old, id_column=key)
    assert result.numbers["unmatched"] == 4 and result.numbers["unmatched_before"] == 0
    assert "56 of 60 items are in both files." in seen["caption"]
    assert "3 rows without a vector in the old file are not drawn." in seen["caption"]
    assert "1 rows with a vector of zeros in the old file are not drawn." in seen["caption"]


def test_files_with_the_same_items_need_no_count(see, tmp_path, no_maps, seen):
    result = see(compare_path=write(tmp_path / "base.txt"))
    assert "in both files" not in seen["caption"] and result.numbers["unmatched"] == 0
    assert see().numbers["unmatched"] is None


def test_unequal_files_need_an_id(see, tmp_path, no_maps):
    before = write(tmp_path / "base.txt", vectors(50))
    with pytest.raises(DataError, match=r"60 rows.*50.*id_column"):
        see(compare_path=before)
    twice = write(tmp_path / "twice.txt", vectors(60), id=["1"] * 60)
    with pytest.raises(DataError, match="not unique"):
        see(compare_path=twice, id_column="id")
    other = write(tmp_path / "other.txt", vectors(60), id=[f"x{i}" for i in range(60)])
    with pytest.raises(DataError, match="no item in common"):
        see(compare_path=other, id_column="id")


def test_contradictory_configs_are_refused():
    with pytest.raises(ConfigError, match="id_column"):
        VisConfig(id_column="id")
    with pytest.raises(ConfigError, match="compare_path"):
        VisConfig(compare_path="./faiss/embeds_2.txt")
    for bad in (
        {"tsne_perplexity": 0.5},
        {"tsne_learning_rate": "fast"},
        {"tsne_learning_rate": 0.0},
        {"umap_neighbors": 1},
        {"method": "pca"},
        {"max_points": 2},
        {"clusters": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            VisConfig(**bad)


@pytest.mark.parametrize("flag, value", [("auto", "auto"), ("200", 200), ("2e2", 200.0)])
def test_the_learning_rate_is_a_number_or_auto(flag, value):
    assert from_flags(VisConfig, {"tsne_learning_rate": flag}).tsne_learning_rate == value


# --- odd data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_handful_of_points(see, draws, tmp_path, n):
    result = see(write(tmp_path / "few.txt", vectors(n)), method="both", explorer=True)
    assert result.picture.is_file() and result.explorer.is_file() and result.numbers["rows"] == n


@pytest.mark.parametrize("n, distinct", [(6, 6), (12, 12), (300, 6)])
def test_a_map_of_few_distinct_vectors_is_a_map(see, tmp_path, seen, n, distinct):
    from sklearn.manifold import trustworthiness

    x = vectors(distinct, dim=16, apart=0.0)[np.arange(n) % distinct]
    see(write(tmp_path / "few.txt", x))
    (panel,) = seen["panels"]
    assert np.isfinite(panel.coords).all() and np.ptp(panel.coords, axis=0).min() > 1e-3
    k = (distinct - 1) // 2
    assert trustworthiness(x[:distinct], panel.coords[:distinct], n_neighbors=k) > 0.7  # a dot's is 0.5


def test_numbers_that_need_two_rows_are_left_out_for_one(see, tmp_path, seen):
    result = see(write(tmp_path / "one.txt", vectors(1)))
    assert not {"mean cosine", "pairs above 0.99", "k-means silhouette", "silhouette"} & set(numbers_of(result))
    assert result.numbers["health"]["mean_cosine"] is None and "silhouette" not in seen["caption"]


def test_a_map_without_neighbourhoods_has_no_trustworthiness(see, tmp_path, seen):
    result = see(write(tmp_path / "same.txt", np.repeat(vectors(1), 50, axis=0)), method="both")
    (panel,) = seen["panels"]  # two would be the same one
    assert panel.title == "PCA (too few distinct vectors)" and panel.note == "trustworthiness not measurable"
    assert result.numbers["maps"]["tsne"]["trustworthiness"] is None
    assert json.loads(result.numbers_path.read_text())["maps"]["umap"]["neighbours_kept"] is None


def test_the_order_of_the_file_decides_no_number(see, tmp_path, no_maps):
    """Equal vectors in a file that is sorted by label: every label is as pure as chance."""
    x = np.repeat(vectors(1), 400, axis=0)
    result = see(write(tmp_path / "sorted.txt", x, category=["A"] * 300 + ["B"] * 100))
    purity = result.tables["labels"].set_index("label")["purity"].to_dict()
    assert purity == {"A": pytest.approx(299 / 399, abs=0.03), "B": pytest.approx(99 / 399, abs=0.03)}
    (pair,) = records(result.tables["confusions"])
    assert {pair[0]: pair[2], pair[1]: pair[3]} == {
        "A": pytest.approx(100 / 399, abs=0.03), "B": pytest.approx(300 / 399, abs=0.03),
    }  # fmt: skip


def test_a_label_called_empty_is_not_the_empty_one(see, tmp_path, no_maps):
    result = see(write(tmp_path / "a.txt", category=["", "(empty)", "x"] * 20))
    assert result.numbers["groups"]["sizes"] == {"((empty))": 20, "(empty)": 20, "x": 20}


def test_perplexity_and_neighbours_are_lowered_with_a_warning(see, tmp_path, no_maps, caplog):
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        see(write(tmp_path / "few.txt", vectors(12)), method="both")
    assert "perplexity 30 lowered" in caplog.text and "15 neighbours lowered to 11" in caplog.text
    assert dict(no_maps)["tsne"]["perplexity"] < 11 / 3


def test_one_label(see, tmp_path, no_maps):
    result = see(write(tmp_path / "one.txt", category=["书籍"] * 60))
    numbers = numbers_of(result)
    assert numbers["same label @1"] == numbers["chance"] == 1.0 and "silhouette" not in numbers


def test_all_labels_null(see, tmp_path, no_maps):
    result = see(write(tmp_path / "nulls.txt", category=[None] * 60))
    assert result.numbers["groups"]["by"] == "k-means cluster"


def test_duplicates_are_projected_once(see, tmp_path, monkeypatch, caplog):
    seen = []
    monkeypatch.setattr(
        projection, "tsne_map", lambda near, start, **_: seen.append(len(start)) or start.astype(np.float32)
    )
    x = vectors()[np.arange(60) % 20]
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        result = see(write(tmp_path / "twice.txt", x))
    assert seen == [20] and numbers_of(result)["repeated vectors"] == 40
    assert "40 of 60 vectors repeat another" in caplog.text


def test_zero_vectors_are_left_out_and_counted(see, tmp_path, no_maps, caplog):
    x = vectors()
    x[[3, 5]] = 0
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        result = see(write(tmp_path / "zeros.txt", x))
    assert result.numbers["rows"] == 58 and result.numbers["health"]["zero"] == 2
    assert "2 vectors are all zeros" in caplog.text
    with pytest.raises(DataError, match="all 60 vectors are zeros"):
        see(write(tmp_path / "nothing.txt", np.zeros((60, 4), np.float32)))


def test_a_column_of_lists_cannot_be_the_label(see, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "lists.parquet")
    pq.write_table(pa.table({"vector": vectors().tolist(), "category": [["a", "b"]] * 60}), path)
    with pytest.raises(DataError, match=r"lists.parquet: column category is list<.*string>"):
        see(path)


def test_a_missing_column_or_file(see, tmp_path):
    with pytest.raises(DataError, match=r"colour.*category"):
        see(label_column="colour")
    with pytest.raises(MissingError, match="nowhere"):
        see("nowhere.txt")


def test_a_column_of_ids_is_recognised(see, monkeypatch, no_maps, caplog):
    monkeypatch.setattr(visualize, "SCORED", 10)
    monkeypatch.setattr(numbers, "SCORED", 10)
    with caplog.at_level(logging.WARNING, logger="ebr_lib"):
        see(label_column="id")
    assert "60 different values" in caplog.text


def test_the_caption_says_how_many_rows_are_scored(see, tmp_path, monkeypatch, no_maps, seen):
    monkeypatch.setattr(visualize, "SCORED", 2)
    monkeypatch.setattr(numbers, "SCORED", 2)
    path = write(tmp_path / "four.txt", category=["a"] * 30 + ["b"] * 20 + ["c"] * 6 + ["d"] * 4)
    found = numbers_of(see(path))
    shown = ", ".join(
        f"{name} {found[name]:.3f}" for name in ("same label @1", "same label @10", "chance", "silhouette")
    )
    assert f"{shown} (of 50 rows), k-means silhouette" in seen["caption"]
    assert "10 rows have a smaller category than the largest 2 and are not scored." in seen["caption"]
    see(path, compare_path=write(tmp_path / "base.txt", vectors(seed=3)))
    assert seen["caption"].count(" → ") > 3 and seen["caption"].count("(of 50 rows)") == 1
    see(write(tmp_path / "two.txt", category=["a", "b"] * 30))
    assert "(of" not in seen["caption"] and "not scored" not in seen["caption"]


def test_a_failed_run_leaves_the_old_picture(see, tmp_path, monkeypatch, no_maps, draws):
    old = see().picture.read_bytes()
    monkeypatch.setattr(figure, "_draw_panel", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        see()
    assert [p.read_bytes() for p in tmp_path.glob("out/*.png")] == [old]


def test_long_tables_are_shown_in_part_and_kept_whole(see, no_maps, caplog):
    with caplog.at_level(logging.INFO, logger="ebr_lib"):
        result = see(label_column="id")
    assert "Labels (id): the first 20 of 60" in caplog.text and "the first 20 of 60" in result._repr_html_()
    assert [len(t["rows"]) for t in result.numbers["tables"] if t["title"] == "Labels (id)"] == [60]


def test_long_labels_are_whole_in_the_json_and_apart_in_the_log(see, tmp_path, no_maps, caplog):
    """Paths of a catalogue begin alike and end apart."""
    names = ["服饰鞋包>女装/女士精品>连衣裙>长袖连衣裙>" + "某" * 40 + end for end in "123"]
    x = vectors(apart=0.3)
    path = write(tmp_path / "long.txt", x, category=[names[i % 3] for i in range(60)])
    with caplog.at_level(logging.INFO, logger="ebr_lib"):
        result = see(path, compare_path=write(tmp_path / "base.txt", vectors(apart=0.1)))
    tables = {table["title"]: table["rows"] for table in result.numbers["tables"]}
    assert {row["label"] for row in tables["Labels (category)"]} == set(names)
    confused = tables["Most confused pairs of labels"]
    assert confused and {row[side] for row in confused for side in ("label", "taken for")} <= set(names)
    lines = as_text(result.tables["labels"]).split("\n")[2:]
    assert len({line.split("  ")[0] for line in lines}) == 3 and "…" in lines[0]
    assert names[0] not in caplog.text


def test_texts_are_whole_in_the_json(see, tmp_path, no_maps):
    texts = [f"第{i}条 " + "字" * 90 + f" {i}" for i in range(60)]
    path = write(tmp_path / "long.txt", vectors(apart=0.3), description=texts)
    result = see(path, compare_path=write(tmp_path / "base.txt", vectors(apart=0.1), description=texts))
    tables = {table["title"].split(" ")[0]: table["rows"] for table in result.numbers["tables"]}
    for table, column in (("Most", "example"), ("Neighbours", "item"), ("Neighbours", "nearest after")):
        assert {row[column] for row in tables[table]} <= set(texts)
