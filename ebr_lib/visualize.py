"""Stage 3: see the embedding. A picture to trust, numbers to act on, and a page to look around in."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.config import VisConfig
from ebr_lib.data.vectors import AGAIN, iter_embeddings, read_embeddings
from ebr_lib.errors import DataError
from ebr_lib.files import check_output_file, write_json
from ebr_lib.logs import logger
from ebr_lib.tables import Shown, Table, shortened
from ebr_lib.view import clusters as measure
from ebr_lib.view import explorer, figure, projection
from ebr_lib.view.figure import Groups, Panel

NEAR = 10  # neighbours that purity, confusions and the explorer look at
WIDE = 40  # neighbours to choose from where the explorer cannot draw all
SCORED = 1000  # labels that are scored; a column with more values is rather an id
LISTED = 20  # rows of a table that are shown
NAMES = {"tsne": "t-SNE", "umap": "UMAP"}
NO_LABEL_TITLE = "k-means cluster"
MIME = {".png": "image/png", ".svg": "image/svg+xml"}  # what a notebook shows by itself
PURITY, TAKEN, TAKEN_BACK = "purity", "share of its neighbours", "and back"
STILL, MOVED_TO = f"of {NEAR} neighbours still there", "cosine to the old ones now"
CAPTIONED = ("same label @1", "same label @10", "chance", "silhouette", "k-means silhouette")

MEANINGS = {
    "shortest vector": ("", "least length in the file; 0 is a text that was not encoded, 1 a normalised vector"),
    "longest vector": ("", "greatest length in the file"),
    "repeated vectors": ("lower", "rows whose vector a row before them has"),
    "pairs above 0.99": ("lower", "share of pairs of rows that are nearly the same vector"),
    "mean cosine": ("lower", "of two different rows; near 1 the model is collapsed"),
    "same label @1": ("higher", "share of nearest neighbours, among projected rows, with the row's own label"),
    "same label @5": ("higher", "the same among the 5 nearest"),
    "same label @10": ("higher", "the same among the 10 nearest"),
    "chance": ("", "what vectors without meaning would reach in the three above"),
    "silhouette": ("higher", "-1 to 1: nearer to the own label than to the next one (cosine)"),
    "Davies-Bouldin": ("lower", "spread of labels against the gaps between their centres (Euclidean)"),
    "Calinski-Harabasz": ("higher", "variance between labels over within; grows with rows: compare equal files only"),
    "k-means silhouette": ("higher", "-1 to 1: whether the vectors fall into clusters by themselves"),
    "ARI": ("higher", "agreement of k-means with the labels, 0 by chance, 1 equal"),
    "NMI": ("higher", "information that k-means shares with the labels, 0 to 1"),
    # columns of the other tables
    "trustworthiness": ("higher", "0 to 1: whether neighbours on the map are near in the original space"),
    "neighbours kept": (
        "higher",
        "share of the 15 nearest in the original space that are among the 15 nearest on the map",
    ),
    PURITY: ("higher", f"share of the {NEAR} nearest with the label (of as many as it has other rows, where fewer)"),
    TAKEN: ("lower", f"of the {NEAR} nearest of the label's rows, the share that has the other label"),
    TAKEN_BACK: ("lower", "the same of the other label's rows and this label"),
    STILL: ("", f"share of the {NEAR} nearest before that are among the {NEAR} nearest after"),
    MOVED_TO: ("", "mean cosine, after, of the row and those that were its nearest before"),
}


@dataclass(frozen=True, repr=False)
class VisResult(Shown):
    """What the stage wrote and measured.

    :param picture: the PNG, SVG or PDF. The config lies beside it, as `.yaml`.
    :param explorer: the interactive page, or None.
    :param numbers_path: the JSON that holds all numbers; `numbers` is its content.
    :param table: the numbers in short; `tables` are all of them.
    """

    picture: Path
    explorer: Path | None
    numbers_path: Path
    numbers: Mapping[str, Any]
    tables: tuple[Table, ...]

    @property
    def table(self) -> Table:
        return self.tables[0]

    def __str__(self) -> str:
        written = [str(path) for path in (self.picture, self.explorer, self.numbers_path) if path]
        return "\n\n".join([f"wrote {', '.join(written)}", *(_head(table).text() for table in self.tables)])

    def _repr_html_(self) -> str:
        parts = []
        if kind := MIME.get(self.picture.suffix.lower()):
            picture = base64.b64encode(self.picture.read_bytes()).decode()
            parts = [f'<img style="max-width:100%" alt="maps" src="data:{kind};base64,{picture}">']
        for path in (self.explorer, None if kind else self.picture):
            if path:
                link = html.escape(os.path.relpath(path), quote=True)
                parts.append(f'<p><a href="{link}" target="_blank">{link}</a></p>')
        return "".join([*parts, *(_head(table).html() for table in self.tables)])


def _head(table: Table) -> Table:
    """As much of a table as a person reads; the JSON has all of it."""
    if len(table.rows) <= LISTED:
        return table
    return Table(f"{table.title}: the first {LISTED} of {len(table.rows)}", table.columns, table.rows[:LISTED])


# --- the items ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Items:
    """Rows that have a direction: unit vectors, labels, texts and lengths of each; and how many have none."""

    unit: Vectors
    labels: list[str | None]
    texts: list[str | None]
    keys: list[Any]
    norms: NDArray[np.float64]
    zero: int
    without_vector: int

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def rows_of_file(self) -> int:
        return len(self) + self.zero + self.without_vector

    def chosen(self, rows: Ints) -> _Items:
        return dataclasses.replace(
            self,
            unit=self.unit[rows],
            labels=[self.labels[r] for r in rows],
            texts=[self.texts[r] for r in rows],
            keys=[self.keys[r] for r in rows],
            norms=self.norms[rows],
        )


def _columns(path: str) -> list[str]:
    return list(next(iter_embeddings(path)).columns)


def _text_column(names: Sequence[str], config: VisConfig) -> str | None:
    if config.text_column is not None:
        return config.text_column
    rest = [name for name in names if name not in (config.label_column, config.id_column)]
    return next(iter([name for name in rest if name == "description"] + rest), config.label_column)


def _read(path: str, label: str | None, text: str | None, key: str | None) -> _Items:
    """The items of a file; without a `key` column their keys are their row numbers."""
    data = read_embeddings(path, list(dict.fromkeys(name for name in (label, text, key) if name is not None)))
    vectors = data.vectors
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    rows = np.flatnonzero(norms > 0)
    if not len(rows):
        raise DataError(f"{path}: all {len(norms)} vectors are zeros; {AGAIN}")
    vectors /= np.maximum(norms, 1e-30)[:, None].astype(np.float32)
    nothing: list[str | None] = [None] * len(data)
    items = _Items(
        vectors,
        data.columns[label] if label else nothing,
        data.columns[text] if text else nothing,
        data.columns[key] if key else data.rows.tolist(),
        norms,
        len(norms) - len(rows),
        data.total - len(data),
    )
    return items if len(rows) == len(norms) else items.chosen(rows)


def _read_pair(config: VisConfig, text: str | None) -> tuple[_Items, _Items]:
    """The rows that the file and the one to compare it with both have, in the order of the first."""
    assert config.compare_path is not None
    now = _read(config.embedding_path, config.label_column, text, config.id_column)
    if config.id_column is not None:
        return _matched(now, _read(config.compare_path, None, None, config.id_column), config)
    shared = [name for name in _columns(config.compare_path) if name in _columns(config.embedding_path)]
    witness = text if text in shared else next(iter(shared), None)
    before = _read(config.compare_path, None, witness, None)
    if now.rows_of_file != before.rows_of_file:
        raise DataError(
            f"{config.embedding_path} has {now.rows_of_file} rows, {config.compare_path} has {before.rows_of_file}: "
            "name the column that says which are the same in id_column"
        )
    now, before = _matched(now, before, config)
    if witness is None:
        logger.warning("%s shares no column with the new file: rows are the same by their order", config.compare_path)
    else:
        here = now if witness == text else _read(config.embedding_path, None, witness, None)
        told = dict(zip(here.keys, here.texts, strict=True))
        _check_same(witness, [told[key] for key in now.keys], before, config)
    return now, before


def _check_same(name: str, values: Sequence[str | None], before: _Items, config: VisConfig) -> None:
    """Rows that are matched by their order must be the same items: a column that both files have says whether."""
    wrong = [i for i, (a, b) in enumerate(zip(values, before.texts, strict=True)) if a != b]
    if wrong:
        row = wrong[0]
        raise DataError(
            f"{config.embedding_path} and {config.compare_path} differ in {name} in {len(wrong)} rows. "
            f"Row {before.keys[row]}: {shortened(values[row] or '')!r} here, {shortened(before.texts[row] or '')!r} "
            "there; name the column that says which rows are the same in id_column"
        )


def _matched(now: _Items, before: _Items, config: VisConfig) -> tuple[_Items, _Items]:
    """The rows whose keys both have."""
    places = {key: row for row, key in enumerate(before.keys)}
    if config.id_column and len(places) < len(before):
        raise DataError(f"{config.compare_path}: {config.id_column} is not unique; name a column that is in id_column")
    rows = np.array([row for row, key in enumerate(now.keys) if key in places], dtype=np.int64)
    if not len(rows):
        raise DataError(f"{config.embedding_path} and {config.compare_path} have no item in common")
    if len(rows) < len(now):
        logger.warning("%d of %d items are in both files; the others are left out", len(rows), len(now))
    return now.chosen(rows), before.chosen(np.array([places[now.keys[row]] for row in rows], dtype=np.int64))


def _groups(labels: Sequence[str | None], title: str) -> Groups:
    sizes = Counter(label for label in labels if label is not None)
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    place = {name: code for code, name in enumerate(names)}
    codes = np.array([-1 if label is None else place[label] for label in labels], dtype=np.int64)
    empty = "(empty)"
    while empty in sizes:  # a label of that very name
        empty = f"({empty})"
    return Groups(codes, [name or empty for name in names], [sizes[name] for name in names], title)


def _cluster_groups(found: measure.Clusters) -> Groups:
    names = [f"cluster {i + 1}" for i in range(found.k)]
    return Groups(found.codes, names, found.sizes, NO_LABEL_TITLE)


# --- one embedding file -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maps:
    """The maps of one embedding file.

    :param rows: the rows that were projected; `near` are the nearest of each, as places in `rows`.
    :param sampled_by: the labels by which they were chosen.
    :param coords: coordinates of all rows, by method.
    """

    rows: Ints
    sampled_by: str
    near: Ints
    coords: dict[str, NDArray[np.float32]]
    quality: dict[str, projection.MapQuality]
    settings: dict[str, dict[str, Any]]


def _sampled(items: _Items, groups: Groups, config: VisConfig, cache: projection.Cache) -> tuple[Ints, str]:
    """The rows to project, and what they were sampled by.

    Both are kept with the maps: another colour is shown on the same rows, for others would cost other maps.
    """
    if len(items) <= config.max_points:
        return np.arange(len(items)), groups.title
    name = projection.fingerprint(items.unit, "rows", config.max_points, config.seed)
    rows = cache.get(f"rows-{name}", lambda: projection.sample_rows(groups.codes, config.max_points, config.seed))
    return rows, str(cache.get(f"by-{name}", lambda: np.array(groups.title)))


def _methods(config: VisConfig) -> list[str]:
    return ["tsne", "umap"] if config.method == "both" else [config.method]


def _settings(points: int, config: VisConfig) -> dict[str, dict[str, Any]]:
    """What each map is made with, fitted to the number of points."""
    found: dict[str, dict[str, Any]] = {}
    for method in _methods(config):
        if points < projection.FEWEST:
            logger.warning("%s: %d distinct vectors are too few; PCA draws them", NAMES[method], points)
            found[method] = {}
        elif method == "tsne":
            perplexity = projection.fitting_perplexity(config.tsne_perplexity, points)
            found[method] = {
                "perplexity": perplexity,
                "learning_rate": config.tsne_learning_rate,
                "seed": config.seed,
            }
        else:
            neighbors = projection.fitting_neighbors(config.umap_neighbors, points)
            seed = None if config.fast else config.seed
            found[method] = {"n_neighbors": neighbors, "min_dist": config.umap_min_dist, "seed": seed}
    return found


def _project(
    unit: Vectors,
    sample: tuple[Ints, str],
    config: VisConfig,
    cache: projection.Cache,
    before: _Maps | None = None,
) -> _Maps:
    """Draw the sampled rows, once for each distinct vector, and place all others by them."""
    rows, sampled_by = sample
    first, place = projection.distinct_rows(unit[rows])
    points = rows[first]
    distinct = unit[points]
    settings = _settings(len(points), config)
    neighbours = _neighbours(distinct, settings, cache)
    coords, quality = {}, {}
    for method, chosen in settings.items():
        start = before.coords[method][points].astype(np.float64) if before else projection.pca_map(distinct)
        drawn = _drawn(method, distinct, neighbours, start, chosen=chosen, cache=cache)
        quality[method] = projection.map_quality(distinct, neighbours, drawn, config.seed)
        everywhere = _everywhere(unit, rows, drawn[place])
        coords[method] = projection.aligned(everywhere, before.coords[method]) if before else everywhere
    return _Maps(
        rows,
        sampled_by,
        projection.neighbours_of_rows(neighbours, place, NEAR if len(rows) <= explorer.MOST else WIDE, config.seed),
        coords,
        quality,
        settings,
    )


def _neighbours(
    distinct: Vectors, settings: Mapping[str, Mapping[str, Any]], cache: projection.Cache
) -> projection.Neighbours:
    """One table in the original space for the maps, their judgement, purity and the explorer."""
    wanted = [NEAR if len(distinct) <= explorer.MOST else WIDE, projection.MAP_NEIGHBOURS]
    wanted += [int(3 * chosen["perplexity"]) for chosen in settings.values() if "perplexity" in chosen]
    wanted += [chosen["n_neighbors"] for chosen in settings.values() if "n_neighbors" in chosen]
    found: list[projection.Neighbours] = []

    def compute() -> projection.Neighbours:
        if not found:
            found.append(projection.exact_neighbours(distinct, max(wanted)))
        return found[0]

    name = projection.fingerprint(distinct, "neighbours", max(wanted))
    return projection.Neighbours(
        cache.get(f"indices-{name}", lambda: compute().indices),
        cache.get(f"distances-{name}", lambda: compute().distances),
    )


def _drawn(
    method: str,
    distinct: Vectors,
    neighbours: projection.Neighbours,
    start: NDArray[np.float64],
    *,
    chosen: Mapping[str, Any],
    cache: projection.Cache,
) -> NDArray[np.float32]:
    def make() -> NDArray[np.float32]:
        logger.info("drawing the %s map of %d points", NAMES[method], len(distinct))
        if not chosen:
            return start.astype(np.float32)
        if method == "tsne":
            return projection.tsne_map(neighbours, start, **chosen)
        near = neighbours
        if distinct.shape[1] > projection.COMPONENTS:
            near = projection.component_neighbours(distinct, chosen["n_neighbors"] - 1)
        return projection.umap_map(near, start, **chosen)

    return cache.get(projection.fingerprint(distinct, method, dict(chosen), start.tobytes()), make)


def _everywhere(unit: Vectors, rows: Ints, drawn: NDArray[np.float32]) -> NDArray[np.float32]:
    """Coordinates of all rows: those drawn, and the rest placed by them."""
    coords = np.empty((len(unit), 2), dtype=np.float32)
    coords[rows] = drawn
    rest = np.setdiff1d(np.arange(len(unit)), rows, assume_unique=True)
    if len(rest):
        coords[rest] = projection.place_rest(unit, rest, unit[rows], drawn)
    return coords


# --- the numbers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Number:
    """A number, and from how many rows it is."""

    value: float
    rows: int


@dataclass(frozen=True)
class _Numbers:
    """All that is measured on one embedding file."""

    health: measure.Health
    clusters: measure.Clusters
    purity: measure.Purity | None
    separation: measure.Separation | None
    labels: list[measure.LabelScore]
    confusions: list[measure.Confusion]
    agreement: tuple[float, float] | None

    def short(self) -> dict[str, _Number]:
        """The numbers of the short table, by name; those that are undefined are left out."""
        n, labelled = len(self.clusters.codes), sum(score.rows for score in self.labels)
        found = {
            "shortest vector": _Number(self.health.norm_min, n),
            "longest vector": _Number(self.health.norm_max, n),
            "repeated vectors": _Number(self.health.repeated, n),
            "pairs above 0.99": _Number(self.health.near_pairs, min(n, measure.PAIRED)),
            "mean cosine": _Number(self.health.mean_cosine, n),
        }
        if self.purity:
            found |= {f"same label @{k}": _Number(share, self.purity.judged) for k, share in self.purity.at.items()}
            found["chance"] = _Number(self.purity.chance, self.purity.judged)
        if self.separation:
            found["silhouette"] = _Number(self.separation.silhouette, labelled)
            found["Davies-Bouldin"] = _Number(self.separation.davies_bouldin, labelled)
            found["Calinski-Harabasz"] = _Number(self.separation.calinski_harabasz, labelled)
        found["k-means silhouette"] = _Number(self.clusters.silhouette, n)
        if self.agreement:
            found |= {name: _Number(v, labelled) for name, v in zip(("ARI", "NMI"), self.agreement, strict=True)}
        return {name: number for name, number in found.items() if not math.isnan(number.value)}


def _health(items: _Items, path: str, config: VisConfig) -> measure.Health:
    distinct = len(projection.distinct_rows(items.unit)[0])
    found = measure.health(
        items.unit,
        items.norms,
        distinct=distinct,
        zero=items.zero,
        without_vector=items.without_vector,
        seed=config.seed,
    )
    for sentence in found.warnings():
        logger.warning("%s: %s", path, sentence)
    return found


def _measure(
    items: _Items, labels: Groups | None, clusters: measure.Clusters, maps: _Maps, health: measure.Health
) -> _Numbers:
    if labels is None or not labels.names:
        return _Numbers(health, clusters, None, None, [], [], None)
    codes = np.where(labels.codes < SCORED, labels.codes, -1)
    near, rows = maps.near[:, :NEAR], maps.rows
    separated = measure.separation(items.unit, codes)
    purity = measure.label_purity(near, codes[rows])
    return _Numbers(
        health=health,
        clusters=clusters,
        purity=purity,
        separation=separated,
        labels=measure.label_scores(codes, rows, purity, separated),
        confusions=[c.of_rows(rows) for c in measure.confusions(items.unit[rows], near, codes[rows])],
        agreement=measure.agreement(clusters.codes, codes),
    )


def _short_table(numbers: _Numbers, before: _Numbers | None) -> Table:
    now = numbers.short()
    title = "Numbers, in the original space"
    if before is None:
        rows = [(name, n.value, n.rows, *MEANINGS[name]) for name, n in now.items()]
        return Table(title, ("number", "value", "rows", "better", "meaning"), rows)
    then = before.short()
    both = [
        (name, then[name].value, n.value, n.value - then[name].value, n.rows, *MEANINGS[name])
        for name, n in now.items()
        if name in then
    ]
    columns = ("number", "before", "after", "change", "rows", "better", "meaning")
    return Table(f"{title}: before and after", columns, both)


def _map_table(maps: _Maps, before: _Maps | None) -> Table:
    sides = [("", maps)] if before is None else [(": before", before), (": after", maps)]
    rows = [
        (
            _map_name(method, side) + which,
            quality.trustworthiness,
            quality.neighbours_kept,
            quality.points,
            "; ".join(f"{k} {v}" for k, v in side.settings[method].items()),
        )
        for method in maps.coords
        for which, side in sides
        if (quality := side.quality[method])
    ]
    return Table(
        "Maps: how far to trust them", ("map", "trustworthiness", "neighbours kept", "judged on", "made with"), rows
    )


def _label_tables(
    numbers: _Numbers, before: _Numbers | None, items: _Items, labels: Groups, projected: int
) -> Iterator[Table]:
    among = f": neighbours among the {projected:,} projected rows" if projected < len(items) else ""
    yield _score_table(numbers, before, labels, f"Labels ({labels.title}){among}")
    pairs = [
        (
            shortened(labels.names[c.first], 30),
            shortened(labels.names[c.second], 30),
            c.share,
            c.share_back,
            *(shortened(items.texts[row] or "", 60) for row in c.example),
        )
        for c in numbers.confusions
    ]
    columns = ("label", "taken for", TAKEN, TAKEN_BACK, "example", "and its neighbour")
    yield Table(f"Most confused pairs of labels{among}", columns, pairs)


def _score_table(numbers: _Numbers, before: _Numbers | None, labels: Groups, title: str) -> Table:
    """The score of each label, after that of before where there is one."""
    then = {score.code: score for score in before.labels} if before else {}
    measures = (PURITY, "silhouette")
    columns = [f"{name} {side}" for name in measures for side in ("before", "after")] if before else measures
    rows = []
    for score in numbers.labels:
        sides = (then[score.code], score) if before else (score,)
        values = [value for name in measures for value in (getattr(side, name) for side in sides)]
        rows.append((shortened(labels.names[score.code], 40), score.rows, *values))
    return Table(title, ("label", "rows", *columns), rows)


def _cluster_table(found: measure.Clusters, items: _Items) -> Table:
    rows = [
        (i + 1, size, " | ".join(shortened(text, 40) for text in _typical_texts(rows, items)))
        for i, (size, rows) in enumerate(zip(found.sizes, found.typical, strict=True))
    ]
    return Table(f"k-means: {found.k} clusters ({found.why})", ("cluster", "rows", "typical texts"), rows)


def _typical_texts(rows: Sequence[int], items: _Items, most: int = 3) -> list[str]:
    return list(dict.fromkeys(items.texts[row] or "" for row in rows))[:most]


def _moved_table(items: _Items, now: _Maps, before: _Maps, most: int = 10) -> Table:
    """The items whose neighbours changed most: of equal shares first those that lie farthest from the old ones."""
    old, new = before.near[:, :NEAR], now.near[:, :NEAR]
    shared = measure.neighbours_shared(old, new)
    apart = measure.neighbour_cosines(items.unit[now.rows], old).mean(axis=1)
    rows = [
        (shortened(items.texts[now.rows[i]] or "", 50), float(shared[i]), float(apart[i]),
         *(shortened(items.texts[now.rows[near[i, 0]]] or "", 50) for near in (old, new)))
        for i in np.lexsort((apart, shared))[:most]
    ]  # fmt: skip
    columns = ("item", STILL, MOVED_TO, "nearest before", "nearest after")
    return Table(f"Neighbours that changed most (on average {shared.mean():.0%} are still there)", columns, rows)


def _meaning_table(tables: Sequence[Table]) -> Table:
    """What the columns of the other tables mean, each once."""
    columns = dict.fromkeys(_measure_of(column) for table in tables for column in table.columns)
    rows = [(name, *MEANINGS[name]) for name in columns if name in MEANINGS]
    return Table("What the columns mean", ("column", "better", "meaning"), rows)


def _measure_of(column: str) -> str:
    return column.removesuffix(" before").removesuffix(" after")


# --- the stage ----------------------------------------------------------------------------------------------------


def visualize_embeddings(config: VisConfig | Mapping[str, Any] | None = None) -> VisResult:
    """Draw an embedding file, measure it, and write the explorer page.

    Writes `output_path` (PNG), and beside it `.json` (all numbers) and `.html` (the page).

    :raises MissingError: there is no embedding file.
    :raises DataError: it cannot be read, or has no such column.
    """
    config = VisConfig.resolve(config)
    check_output_file(Path(config.output_path))
    text = _text_column(_columns(config.embedding_path), config)
    old = None
    if config.compare_path is None:
        items = _read(config.embedding_path, config.label_column, text, None)
    else:
        items, old = _read_pair(config, text)
    _say_absent_fonts(config)
    health = _health(items, config.embedding_path, config)
    labels = _groups(items.labels, config.label_column) if config.label_column else None
    if labels and len(labels.names) > SCORED:
        logger.warning(
            "%s has %d different values: rather an id than a label; the largest %d are scored",
            labels.title, len(labels.names), SCORED,
        )  # fmt: skip
    wanted = len(labels.names) if labels and len(labels.names) <= SCORED else 0
    clusters = measure.find_clusters(items.unit, config.clusters, wanted, config.seed)
    groups = labels if labels and labels.names else _cluster_groups(clusters)

    picture = Path(config.output_path)
    cache = projection.Cache(picture.with_suffix(".maps.npz") if config.cache and not config.fast else None)
    sample = _sampled(items, groups, config, cache)
    before = _project(old.unit, sample, config, cache) if old else None
    maps = _project(items.unit, sample, config, cache, before)
    cache.save()
    numbers = _measure(items, labels, clusters, maps, health)
    then = None
    if old and before:
        assert config.compare_path is not None
        old_clusters = measure.find_clusters(old.unit, clusters.k, 0, config.seed)
        then = _measure(old, labels, old_clusters, before, _health(old, config.compare_path, config))
    tables = list(_tables(items, maps, numbers, labels, clusters, before=before, then=then))
    for table in tables:
        logger.info("%s", _head(table))

    panels = list(_panels(maps, before))
    caption = _caption(items, groups, maps, numbers, then, seed=config.seed)
    figure.draw(picture, panels, groups, title=_title(config), caption=caption, fonts=config.chinese_fonts)
    content = _content(config, maps, numbers, map_before=before, before=then, groups=groups, tables=tables)
    write_json(picture.with_suffix(".json"), content)
    config.save(picture.with_suffix(".yaml"))
    page = None
    if config.explorer:
        sides = [(side.unit, drawn) for side, drawn in ((old, before), (items, maps)) if side and drawn]
        page = _explore(picture.with_suffix(".html"), items, sides, panels, groups, config=config)
    logger.info("wrote %s", ", ".join(str(path) for path in (picture, page, picture.with_suffix(".json")) if path))
    return VisResult(picture, page, picture.with_suffix(".json"), content, tuple(tables))


def _say_absent_fonts(config: VisConfig) -> None:
    """Of the fonts that somebody named; the default names those of every system."""
    named = [name for name in config.chinese_fonts if name not in VisConfig().chinese_fonts]
    if absent := figure.absent_fonts(named):
        logger.warning("chinese_fonts: there is no font %s here; others are taken", ", ".join(absent))


def _tables(
    items: _Items,
    maps: _Maps,
    numbers: _Numbers,
    labels: Groups | None,
    clusters: measure.Clusters,
    *,
    before: _Maps | None,
    then: _Numbers | None,
) -> Iterator[Table]:
    tables = [_map_table(maps, before), _cluster_table(clusters, items)]
    if before and maps.near.shape[1]:
        tables.append(_moved_table(items, maps, before))
    if labels and labels.names:
        tables += _label_tables(numbers, then, items, labels, len(maps.rows))
    return iter([_short_table(numbers, then), *tables, _meaning_table(tables)])


def _map_name(method: str, maps: _Maps) -> str:
    return NAMES[method] if maps.settings[method] else "PCA (too few distinct vectors)"


def _panels(maps: _Maps, before: _Maps | None) -> Iterator[Panel]:
    sides = [(before, "before"), (maps, "after")] if before else [(maps, "")]
    methods = list(maps.coords)
    if not any(side.settings[method] for side, _ in sides if side for method in methods):
        methods = methods[:1]  # PCA draws both alike
    for method in methods:
        for space, (side, which) in enumerate(sides):
            assert side is not None
            name = _map_name(method, side)
            note = _note(side.quality[method])
            yield Panel(f"{name}: {which}" if which else name, side.coords[method], note, space)


def _note(quality: projection.MapQuality) -> str:
    if math.isnan(quality.trustworthiness):
        return "trustworthiness not measurable"
    return f"trustworthiness {quality.trustworthiness:.3f}, neighbours kept {quality.neighbours_kept:.1%}"


def _explore(
    path: Path,
    items: _Items,
    sides: Sequence[tuple[Vectors, _Maps]],
    panels: Sequence[Panel],
    groups: Groups,
    *,
    config: VisConfig,
) -> Path:
    """Write the page of up to 50,000 of the projected points; `sides` are the spaces that the panels are maps of."""
    projected = sides[0][1].rows
    chosen = projection.sample_rows(groups.codes[projected], explorer.MOST, config.seed)
    rows = projected[chosen]
    explorer.write_explorer(
        path,
        [dataclasses.replace(panel, coords=panel.coords[rows]) for panel in panels],
        dataclasses.replace(groups, codes=groups.codes[rows]),
        texts=[items.texts[row] for row in rows],
        spaces=[_neighbourhood(unit[rows], _near_drawn(maps.near, chosen)) for unit, maps in sides],
        name=_title(config),
        all_rows=len(items),
    )
    return path


def _neighbourhood(unit: Vectors, near: Ints) -> explorer.Neighbourhood:
    return explorer.Neighbourhood(near, measure.neighbour_cosines(unit, np.maximum(near, 0)))


def _near_drawn(near: Ints, chosen: Ints) -> Ints:
    """Neighbours as places among the chosen points: the nearest ten that are chosen, -1 where there are fewer."""
    place = np.full(len(near), -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    found = place[near[chosen]]
    order = np.argsort(found < 0, axis=1, kind="stable")[:, :NEAR]
    return np.take_along_axis(found, order, 1)


def _title(config: VisConfig) -> str:
    name = Path(config.embedding_path).name
    return f"{Path(config.compare_path).name} → {name}" if config.compare_path else name


def _caption(
    items: _Items, groups: Groups, maps: _Maps, numbers: _Numbers, before: _Numbers | None, *, seed: int
) -> str:
    n, drawn = len(items), len(maps.rows)
    sample = f"All {n:,} vectors were projected (seed {seed})."
    if drawn < n:
        sample = (
            f"{drawn:,} of {n:,} vectors were projected (sampled by {maps.sampled_by}, seed {seed}); "
            "the rest lie where their nearest projected neighbours do."
        )
    trust = (
        "Neighbours kept: share of the 15 nearest in the original space that are among the 15 nearest on the map. "
        "Distances between groups on a map mean little; the numbers are from the original space."
    )
    return "\n".join(filter(None, [f"{sample} {trust}", _left_out(items, groups), _captioned(numbers, before)]))


def _left_out(items: _Items, groups: Groups) -> str:
    """How many rows of the file are not on the map, or grey on it."""
    counts = [
        (items.without_vector, "without a vector are not drawn"),
        (items.zero, "with a vector of zeros are not drawn"),
        (groups.without, f"without {groups.title} are grey"),
    ]
    return " ".join(f"{count:,} rows {what}." for count, what in counts if count)


def _captioned(numbers: _Numbers, before: _Numbers | None) -> str:
    now, then = numbers.short(), before.short() if before else None
    shown = [name for name in CAPTIONED if name in now and (then is None or name in then)]
    if not shown:
        return ""
    if then is None:
        return "In the original space: " + ", ".join(f"{name} {now[name].value:.3f}" for name in shown) + "."
    pairs = [f"{name} {then[name].value:.3f} → {now[name].value:.3f}" for name in shown]
    return "In the original space, before → after: " + ", ".join(pairs) + "."


def _content(
    config: VisConfig,
    maps: _Maps,
    numbers: _Numbers,
    *,
    map_before: _Maps | None,
    before: _Numbers | None,
    groups: Groups,
    tables: Sequence[Table],
) -> dict[str, Any]:
    """All numbers as plain values for JSON."""
    content = {
        "config": config.to_dict(),
        "rows": len(groups.codes),
        "projected": len(maps.rows),
        "health": dataclasses.asdict(numbers.health),
        "health_before": dataclasses.asdict(before.health) if before else None,
        "maps": _map_content(maps),
        "maps_before": _map_content(map_before) if map_before else None,
        "numbers": {n: _with_meaning(n, v) for n, v in numbers.short().items()},
        "before": {n: _with_meaning(n, v) for n, v in before.short().items()} if before else None,
        "groups": {"by": groups.title, "without": groups.without,
                   "sizes": dict(zip(groups.names, groups.counts, strict=True))},
        "meanings": {name: {"better": better, "meaning": what} for name, better, what in tables[-1].rows},
        "tables": [_table_content(table) for table in tables[1:-1]],
    }  # fmt: skip
    return _plain(content)


def _map_content(maps: _Maps) -> dict[str, Any]:
    return {m: dataclasses.asdict(quality) | maps.settings[m] for m, quality in maps.quality.items()}


def _table_content(table: Table) -> dict[str, Any]:
    return {"title": table.title, "rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows]}


def _with_meaning(name: str, number: _Number) -> dict[str, Any]:
    better, meaning = MEANINGS[name]
    return {"value": number.value, "rows": number.rows, "better": better, "meaning": meaning}


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no numpy."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
