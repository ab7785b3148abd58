"""What is measured on one embedding file or two, and how tables, caption and JSON show it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from pandas import DataFrame

from ebr_lib.logs import logger
from ebr_lib.tables import make_table
from ebr_lib.visualize import clusters as measure
from ebr_lib.visualize import projection
from ebr_lib.visualize.groups import Groups
from ebr_lib.visualize.labelled_vectors import LabelledVectors
from ebr_lib.visualize.maps import NEAR, Maps

SCORED = 1000  # labels that are scored; a column with more values is probably an id
CAPTIONED = ("same label @1", "same label @10", "chance", "silhouette", "k-means silhouette")
KEPT = "neighbours kept"
PURITY, TAKEN, TAKEN_BACK = "purity", "share of its neighbours", "and back"
SCALED = "of vectors brought to length 1"
STILL, MOVED_TO = f"of {NEAR} neighbours still there", "cosine to the old ones now"

MEANINGS = {
    "shortest vector": ("", "least length in the file; 0 is a text that was not encoded, 1 a normalised vector"),
    "longest vector": ("", "greatest length in the file"),
    "repeated vectors": ("lower", "rows whose vector an earlier row has"),
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
    PURITY: ("higher", f"share of the {NEAR} nearest with the label (of as many as it has other rows, if fewer)"),
    TAKEN: ("lower", f"of the {NEAR} nearest of the label's rows, the share that has the other label"),
    TAKEN_BACK: ("lower", "the same of the other label's rows and this label"),
    STILL: ("", f"share of the {NEAR} nearest before that are among the {NEAR} nearest after"),
    MOVED_TO: ("", "mean cosine, after, of the row and those that were its nearest before"),
}


@dataclass(frozen=True)
class Number:
    """A number, and how many rows it was measured on."""

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
        """The numbers of the short table, by name, without the undefined ones."""
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


@dataclass(frozen=True)
class Side:
    """One embedding file, drawn and measured."""

    vectors: LabelledVectors
    maps: Maps
    numbers: Numbers


def health_of(vectors: LabelledVectors, seed: int) -> measure.Health:
    """Measure `clusters.health`, and log what is wrong with the vectors."""
    found = measure.health(
        vectors.unit,
        vectors.norms,
        distinct=len(projection.distinct_rows(vectors.unit)[0]),
        zero=vectors.zero,
        without_vector=vectors.without_vector,
        seed=seed,
    )
    for sentence in found.warnings():
        logger.warning("向量检查 check of the vectors %s: %s", vectors.path, sentence)
    return found


def measured(
    vectors: LabelledVectors, labels: Groups | None, clusters: measure.Clusters, maps: Maps, health: measure.Health
) -> Numbers:
    """Measure all that can be measured: without labels, health and clusters only."""
    if labels is None or not labels.names:
        return Numbers(health, clusters, None, None, [], [], None)
    codes = np.where(labels.codes < SCORED, labels.codes, -1)
    near, rows = maps.near[:, :NEAR], maps.rows
    separated = measure.separation(vectors.unit, codes)
    purity = measure.label_purity(near, codes[rows])
    return Numbers(
        health=health,
        clusters=clusters,
        purity=purity,
        separation=separated,
        labels=measure.label_scores(codes, rows, purity, separated),
        confusions=measure.confusions(vectors.unit[rows], near, codes[rows]),
        agreement=measure.agreement(clusters.codes, codes),
    )


# --- tables -------------------------------------------------------------------------------------------------------


def tables_of(now: Side, before: Side | None, labels: Groups | None) -> dict[str, DataFrame]:
    """The numbers in short, all others, and at the end what their columns mean."""
    tables = {"maps": _map_table(now, before), "clusters": _cluster_table(now)}
    if before and now.maps.near.shape[1]:
        tables["moved"] = _moved_table(now, before)
    if labels and labels.names:
        drawn = len(now.maps.rows)
        among = f": neighbours among the {drawn:,} projected rows" if drawn < len(now.vectors) else ""
        tables["labels"] = _score_table(now, before, labels, f"Labels ({labels.title}){among}")
        tables["confusions"] = _confusion_table(now, labels, among)
    measures = (name.removesuffix(" before").removesuffix(" after") for table in tables.values() for name in table)
    meanings = MEANINGS | {KEPT: (MEANINGS[KEPT][0], _meaning_of_kept(now, before))}
    rows = [(name, *meanings[name]) for name in dict.fromkeys(measures) if name in meanings]
    explained = make_table("What the columns mean", ("column", "better", "meaning"), rows)
    return {"numbers": _short_table(now, before)} | tables | {"meanings": explained}


def _short_table(now: Side, before: Side | None) -> DataFrame:
    found, title = now.numbers.short(), "Numbers, in the original space"
    if before is None:
        rows = [(name, n.value, n.rows, *MEANINGS[name]) for name, n in found.items()]
        return make_table(title, ("number", "value", "rows", "better", "meaning"), rows)
    then = before.numbers.short()
    both = [
        (name, then[name].value, n.value, n.value - then[name].value, n.rows, *MEANINGS[name])
        for name, n in found.items()
        if name in then
    ]
    columns = ("number", "before", "after", "change", "rows", "better", "meaning")
    return make_table(f"{title}: before and after", columns, both)


def _map_table(now: Side, before: Side | None) -> DataFrame:
    sides = [("", now.maps)] if before is None else [(": before", before.maps), (": after", now.maps)]
    rows = [
        (
            maps.name_of(method) + which,
            quality.trustworthiness,
            quality.neighbours_kept,
            quality.points,
            "; ".join(f"{k} {v}" for k, v in maps.settings[method].items()),
        )
        for method in now.maps.coords
        for which, maps in sides
        if (quality := maps.quality[method])
    ]
    return make_table("Maps: how far to trust them", ("map", "trustworthiness", KEPT, "judged on", "made with"), rows)


def _score_table(now: Side, before: Side | None, labels: Groups, title: str) -> DataFrame:
    """The score of each label, after its score before if there is one."""
    then = {score.code: score for score in before.numbers.labels} if before else {}
    measures = (PURITY, "silhouette")
    columns = [f"{name} {side}" for name in measures for side in ("before", "after")] if before else measures
    rows = []
    for score in now.numbers.labels:
        scores = (then[score.code], score) if before else (score,)
        values = [getattr(each, name) for name in measures for each in scores]
        rows.append((labels.names[score.code], score.rows, *values))
    return make_table(title, ("label", "rows", *columns), rows, width=40)


def _confusion_table(now: Side, labels: Groups, among: str) -> DataFrame:
    names, texts = labels.names, [now.vectors.texts[row] for row in now.maps.rows]
    rows = [
        (names[c.first], names[c.second], c.share, c.share_back, *(texts[row] or "" for row in c.example))
        for c in now.numbers.confusions
    ]
    columns = ("label", "taken for", TAKEN, TAKEN_BACK, "example", "and its neighbour")
    return make_table(f"Most confused pairs of labels{among}", columns, rows, width=40)


def _cluster_table(now: Side) -> DataFrame:
    found, names, rows = now.numbers.clusters, ("distinctive words", "typical text", "second", "third"), []
    for i, (size, typical) in enumerate(zip(found.sizes, found.typical, strict=True)):
        texts = [*dict.fromkeys(now.vectors.texts[row] or "" for row in typical), "", "", ""]  # different ones
        rows.append((i + 1, size, found.words[i] if found.words else "", *texts[: len(names) - 1]))
    title = f"k-means: {found.k} clusters ({found.why})"
    return make_table(title, ("cluster", "rows", *names), rows, width=40)


def _moved_table(now: Side, before: Side, most: int = 10) -> DataFrame:
    """The items whose neighbours changed most; of equal shares, first those farthest from their old neighbours."""
    old, new, rows = before.maps.near[:, :NEAR], now.maps.near[:, :NEAR], now.maps.rows
    shared = measure.neighbours_shared(old, new)
    apart = measure.neighbour_cosines(now.vectors.unit[rows], old).mean(axis=1)
    text_of = [now.vectors.texts[row] or "" for row in rows]
    shown = [
        (text_of[i], float(shared[i]), float(apart[i]), text_of[old[i, 0]], text_of[new[i, 0]])
        for i in np.lexsort((apart, shared))[:most]
    ]
    columns = ("item", STILL, MOVED_TO, "nearest before", "nearest after")
    title = f"Neighbours that changed most (on average {shared.mean():.0%} are still there)"
    return make_table(title, columns, shown, width=50)


def _meaning_of_kept(now: Side, before: Side | None) -> str:
    """The meaning of "neighbours kept", with the number of neighbours that these maps were judged on."""
    judged = {quality.neighbours for side in (now, before) if side for quality in side.maps.quality.values()} - {0}
    return MEANINGS[KEPT][1].format(" or ".join(map(str, sorted(judged or {projection.MAP_NEIGHBOURS}))))


# --- caption ------------------------------------------------------------------------------------------------------


def caption_of(now: Side, before: Side | None, groups: Groups, seed: int) -> str:
    """What is on the picture and what is not, how far to trust it, and the numbers in short."""
    n, drawn = len(now.vectors), len(now.maps.rows)
    sample = f"All {n:,} vectors were projected (seed {seed})."
    if drawn < n:
        sample = (
            f"{drawn:,} of {n:,} vectors were projected (sampled by {now.maps.sampled_by}, seed {seed}); "
            "the rest lie where their nearest projected neighbours do."
        )
    trust = (
        f"Neighbours kept: {_meaning_of_kept(now, before)}. "
        "Distances between groups on a map mean little; the numbers are from the original space."
    )
    return "\n".join(filter(None, [f"{sample} {trust}", _left_out(now, before, groups), _in_short(now, before)]))


def _left_out(now: Side, before: Side | None, groups: Groups) -> str:
    """How many rows of the files are not on the map, are grey on it, or are not in the numbers."""
    sides = [(" in the new file", now), (" in the old file", before)] if before else [("", now)]
    counts = [
        *((side.vectors.without_vector, f"without a vector{where} are not drawn") for where, side in sides),
        *((side.vectors.zero, f"with a vector of zeros{where} are not drawn") for where, side in sides),
        (groups.without, f"without {groups.title} are grey"),
        (sum(groups.counts[SCORED:]), f"have a smaller {groups.title} than the largest {SCORED:,} and are not scored"),
    ]
    n, missing = len(now.vectors), sum(side.vectors.unmatched for _, side in sides)
    shared = f"{n:,} of {n + missing:,} items are in both files." if missing else ""
    return " ".join(filter(None, [shared, *(f"{count:,} rows {what}." for count, what in counts if count)]))


def _in_short(now: Side, before: Side | None) -> str:
    found, then = now.numbers.short(), before.numbers.short() if before else None
    shown = [name for name in CAPTIONED if name in found and (then is None or name in then)]
    parts = []
    for rows, names in itertools.groupby(shown, key=lambda name: found[name].rows):
        values = (f"{name} {f'{then[name].value:.3f} → ' if then else ''}{found[name].value:.3f}" for name in names)
        parts.append(", ".join(values) + (f" (of {rows:,} rows)" if rows < len(now.vectors) else ""))
    return f"In the original space{', before → after' if then else ''}: {', '.join(parts)}." if parts else ""
