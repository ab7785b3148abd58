"""All that is measured on one embedding file, and the tables that show it, after what was measured before it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pandas import DataFrame

from ebr_lib.logs import logger
from ebr_lib.tables import make_table
from ebr_lib.visualize import clusters as measure
from ebr_lib.visualize import projection
from ebr_lib.visualize.groups import Groups
from ebr_lib.visualize.labelled_vectors import Items
from ebr_lib.visualize.maps import NEAR, Maps

SCORED = 1000  # labels that are scored; a column with more values is rather an id
KEPT = "neighbours kept"
PURITY, TAKEN, TAKEN_BACK = "purity", "share of its neighbours", "and back"
SCALED = "of vectors brought to length 1"
STILL, MOVED_TO = f"of {NEAR} neighbours still there", "cosine to the old ones now"

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
    "Davies-Bouldin": ("lower", f"spread of labels against the gaps between their centres (Euclidean; {SCALED})"),
    "Calinski-Harabasz": (
        "higher",
        f"variance between labels over within ({SCALED}); grows with rows: compare equal files only",
    ),
    "k-means silhouette": ("higher", "-1 to 1: whether the vectors fall into clusters by themselves"),
    "ARI": ("higher", "agreement of k-means with the labels, 0 by chance, 1 equal"),
    "NMI": ("higher", "information that k-means shares with the labels, 0 to 1"),
    # columns of the other tables
    "trustworthiness": ("higher", "0 to 1: whether neighbours on the map are near in the original space"),
    KEPT: ("higher", "share of the {0} nearest in the original space that are among the {0} nearest on the map"),
    PURITY: ("higher", f"share of the {NEAR} nearest with the label (of as many as it has other rows, where fewer)"),
    TAKEN: ("lower", f"of the {NEAR} nearest of the label's rows, the share that has the other label"),
    TAKEN_BACK: ("lower", "the same of the other label's rows and this label"),
    STILL: ("", f"share of the {NEAR} nearest before that are among the {NEAR} nearest after"),
    MOVED_TO: ("", "mean cosine, after, of the row and those that were its nearest before"),
}


@dataclass(frozen=True)
class Number:
    """A number, and from how many rows it is."""

    value: float
    rows: int


@dataclass(frozen=True)
class Numbers:
    """All that is measured on one embedding file."""

    health: measure.Health
    clusters: measure.Clusters
    purity: measure.Purity | None
    separation: measure.Separation | None
    labels: list[measure.LabelScore]
    confusions: list[measure.Confusion]
    agreement: tuple[float, float] | None

    def short(self) -> dict[str, Number]:
        """The numbers of the short table, by name; those that are undefined are left out."""
        n, labelled = len(self.clusters.codes), sum(score.rows for score in self.labels)
        found = {
            "shortest vector": Number(self.health.norm_min, n),
            "longest vector": Number(self.health.norm_max, n),
            "repeated vectors": Number(self.health.repeated, n),
            "pairs above 0.99": Number(self.health.near_pairs, min(n, measure.PAIRED)),
            "mean cosine": Number(self.health.mean_cosine, n),
        }
        if self.purity:
            found |= {f"same label @{k}": Number(share, self.purity.judged) for k, share in self.purity.at.items()}
            found["chance"] = Number(self.purity.chance, self.purity.judged)
        if self.separation:
            found["silhouette"] = Number(self.separation.silhouette, labelled)
            found["Davies-Bouldin"] = Number(self.separation.davies_bouldin, labelled)
            found["Calinski-Harabasz"] = Number(self.separation.calinski_harabasz, labelled)
        found["k-means silhouette"] = Number(self.clusters.silhouette, n)
        if self.agreement:
            found |= {name: Number(v, labelled) for name, v in zip(("ARI", "NMI"), self.agreement, strict=True)}
        return {name: number for name, number in found.items() if not math.isnan(number.value)}


def health_of(items: Items, seed: int) -> measure.Health:
    """As `clusters.health`; what is wrong with the vectors goes to the log."""
    distinct = len(projection.distinct_rows(items.unit)[0])
    found = measure.health(
        items.unit,
        items.norms,
        distinct=distinct,
        zero=items.zero,
        without_vector=items.without_vector,
        seed=seed,
    )
    for sentence in found.warnings():
        logger.warning("%s: %s", items.path, sentence)
    return found


def measured(
    items: Items, labels: Groups | None, clusters: measure.Clusters, maps: Maps, health: measure.Health
) -> Numbers:
    """Measure what there is to measure; without labels that is health and clusters."""
    if labels is None or not labels.names:
        return Numbers(health, clusters, None, None, [], [], None)
    codes = np.where(labels.codes < SCORED, labels.codes, -1)
    near, rows = maps.near[:, :NEAR], maps.rows
    separated = measure.separation(items.unit, codes)
    purity = measure.label_purity(near, codes[rows])
    return Numbers(
        health=health,
        clusters=clusters,
        purity=purity,
        separation=separated,
        labels=measure.label_scores(codes, rows, purity, separated),
        confusions=[c.of_rows(rows) for c in measure.confusions(items.unit[rows], near, codes[rows])],
        agreement=measure.agreement(clusters.codes, codes),
    )


# --- tables -------------------------------------------------------------------------------------------------------


def tables_of(
    items: Items,
    maps: Maps,
    numbers: Numbers,
    labels: Groups | None,
    *,
    maps_before: Maps | None,
    before: Numbers | None,
) -> dict[str, DataFrame]:
    """The numbers in short, all others, and at the end what their columns mean."""
    tables = {"maps": _map_table(maps, maps_before), "clusters": _cluster_table(numbers.clusters, items)}
    if maps_before and maps.near.shape[1]:
        tables["moved"] = _moved_table(items, maps, maps_before)
    if labels and labels.names:
        among = f": neighbours among the {len(maps.rows):,} projected rows" if len(maps.rows) < len(items) else ""
        tables["labels"] = _score_table(numbers, before, labels, f"Labels ({labels.title}){among}")
        tables["confusions"] = _confusion_table(numbers, items, labels, among)
    meanings = _meaning_table(tables.values(), maps, maps_before)
    return {"numbers": _short_table(numbers, before)} | tables | {"meanings": meanings}


def _short_table(numbers: Numbers, before: Numbers | None) -> DataFrame:
    now = numbers.short()
    title = "Numbers, in the original space"
    if before is None:
        rows = [(name, n.value, n.rows, *MEANINGS[name]) for name, n in now.items()]
        return make_table(title, ("number", "value", "rows", "better", "meaning"), rows)
    then = before.short()
    both = [
        (name, then[name].value, n.value, n.value - then[name].value, n.rows, *MEANINGS[name])
        for name, n in now.items()
        if name in then
    ]
    columns = ("number", "before", "after", "change", "rows", "better", "meaning")
    return make_table(f"{title}: before and after", columns, both)


def _map_table(maps: Maps, before: Maps | None) -> DataFrame:
    sides = [("", maps)] if before is None else [(": before", before), (": after", maps)]
    rows = [
        (
            side.name_of(method) + which,
            quality.trustworthiness,
            quality.neighbours_kept,
            quality.points,
            "; ".join(f"{k} {v}" for k, v in side.settings[method].items()),
        )
        for method in maps.coords
        for which, side in sides
        if (quality := side.quality[method])
    ]
    return make_table("Maps: how far to trust them", ("map", "trustworthiness", KEPT, "judged on", "made with"), rows)


def _confusion_table(numbers: Numbers, items: Items, labels: Groups, among: str) -> DataFrame:
    pairs = [
        (
            labels.names[c.first],
            labels.names[c.second],
            c.share,
            c.share_back,
            *(items.texts[row] or "" for row in c.example),
        )
        for c in numbers.confusions
    ]
    columns = ("label", "taken for", TAKEN, TAKEN_BACK, "example", "and its neighbour")
    return make_table(f"Most confused pairs of labels{among}", columns, pairs, width=40)


def _score_table(numbers: Numbers, before: Numbers | None, labels: Groups, title: str) -> DataFrame:
    """The score of each label, after that of before where there is one."""
    then = {score.code: score for score in before.labels} if before else {}
    measures = (PURITY, "silhouette")
    columns = [f"{name} {side}" for name in measures for side in ("before", "after")] if before else measures
    rows = []
    for score in numbers.labels:
        sides = (then[score.code], score) if before else (score,)
        values = [value for name in measures for value in (getattr(side, name) for side in sides)]
        rows.append((labels.names[score.code], score.rows, *values))
    return make_table(title, ("label", "rows", *columns), rows, width=40)


def _cluster_table(found: measure.Clusters, items: Items) -> DataFrame:
    names = ("typical text", "second", "third")
    rows = [
        (i + 1, size, *_typical_texts(rows, items, len(names)))
        for i, (size, rows) in enumerate(zip(found.sizes, found.typical, strict=True))
    ]
    title = f"k-means: {found.k} clusters ({found.why})"
    return make_table(title, ("cluster", "rows", *names), rows, width=40)


def _typical_texts(rows: Sequence[int], items: Items, count: int) -> list[str]:
    """Different ones, filled up with empty ones."""
    texts = dict.fromkeys(items.texts[row] or "" for row in rows)
    return [*texts, *[""] * count][:count]


def _moved_table(items: Items, now: Maps, before: Maps, most: int = 10) -> DataFrame:
    """The items whose neighbours changed most: of equal shares first those that lie farthest from the old ones."""
    old, new = before.near[:, :NEAR], now.near[:, :NEAR]
    shared = measure.neighbours_shared(old, new)
    apart = measure.neighbour_cosines(items.unit[now.rows], old).mean(axis=1)
    rows = [
        (items.texts[now.rows[i]] or "", float(shared[i]), float(apart[i]),
         *(items.texts[now.rows[near[i, 0]]] or "" for near in (old, new)))
        for i in np.lexsort((apart, shared))[:most]
    ]  # fmt: skip
    columns = ("item", STILL, MOVED_TO, "nearest before", "nearest after")
    title = f"Neighbours that changed most (on average {shared.mean():.0%} are still there)"
    return make_table(title, columns, rows, width=50)


def meaning_of_kept(*sides: Maps | None) -> str:
    """What "neighbours kept" means on these maps: of how many neighbours it is the share."""
    looked_at = {quality.neighbours for side in sides if side for quality in side.quality.values()} - {0}
    return MEANINGS[KEPT][1].format(" or ".join(map(str, sorted(looked_at or {projection.MAP_NEIGHBOURS}))))


def _meaning_table(tables: Iterable[DataFrame], *sides: Maps | None) -> DataFrame:
    """What the columns of the other tables mean, each once."""
    columns = dict.fromkeys(_measure_of(column) for table in tables for column in table)
    meanings = MEANINGS | {KEPT: (MEANINGS[KEPT][0], meaning_of_kept(*sides))}
    rows = [(name, *meanings[name]) for name in columns if name in meanings]
    return make_table("What the columns mean", ("column", "better", "meaning"), rows)


def _measure_of(column: str) -> str:
    return column.removesuffix(" before").removesuffix(" after")
