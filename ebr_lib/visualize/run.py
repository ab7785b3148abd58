"""Stage 3: see the embedding. A picture to trust, numbers to act on, and a page to look around in."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from ebr_lib.arrays import Ints, Vectors
from ebr_lib.data.embeddings.files import files_of
from ebr_lib.extras import require
from ebr_lib.files import check_apart, check_output_file, write_json
from ebr_lib.logs import RESULT, logger
from ebr_lib.tables import TableRepr, as_html, as_text, html_link, html_picture
from ebr_lib.visualize import clusters as measure
from ebr_lib.visualize import explorer, fonts, projection
from ebr_lib.visualize import figure as visualize_figure
from ebr_lib.visualize.config import VisConfig
from ebr_lib.visualize.groups import Groups, Panel, groups_of
from ebr_lib.visualize.labelled_vectors import Items, columns_in, read_both, read_items
from ebr_lib.visualize.maps import NEAR, Maps, project, sampled
from ebr_lib.visualize.summary import MEANINGS, SCORED, Numbers, health_of, meaning_of_kept, measured, tables_of

NUMBERS, CONFIG, PAGE, MAPS = BESIDE = ".json", ".yaml", ".html", ".maps.npz"  # endings in place of the picture's
LISTED = 20  # rows of a table that are shown
NO_LABEL_TITLE = "k-means cluster"
CAPTIONED = ("same label @1", "same label @10", "chance", "silhouette", "k-means silhouette")


@dataclass(frozen=True, repr=False)
class VisResult(TableRepr):
    """What the stage wrote and measured.

    :param picture: the PNG, SVG or PDF. The config lies beside it, as `.yaml`.
    :param explorer: the interactive page, or None.
    :param numbers_path: the JSON that holds all numbers; `numbers` is its content.
    :param tables: `numbers` in short, `maps`, `clusters`, `labels`, `confusions`, `moved`, and the `meanings` of
        their columns.
    """

    picture: Path
    explorer: Path | None
    numbers_path: Path
    numbers: Mapping[str, Any]
    tables: dict[str, DataFrame] = field(compare=False)

    def __repr__(self) -> str:
        written = [str(path) for path in (self.picture, self.explorer, self.numbers_path) if path]
        return "\n\n".join([f"wrote {', '.join(written)}", *(as_text(_head(table)) for table in self.tables.values())])

    def _repr_html_(self) -> str:
        parts = [html_picture(self.picture, "maps"), html_link(self.explorer) if self.explorer else ""]
        return "".join([*parts, *(as_html(_head(table)) for table in self.tables.values())])


def _head(table: DataFrame) -> DataFrame:
    """As much of a table as a person reads; the JSON has all of it."""
    head = table.head(LISTED)
    if len(head) < len(table):
        head.attrs["title"] += f": the first {LISTED} of {len(table)}"
    return head


@dataclass(frozen=True)
class _Side:
    """One embedding file, drawn and measured."""

    items: Items
    maps: Maps
    numbers: Numbers


# --- the stage ----------------------------------------------------------------------------------------------------


def visualize_embeddings(config: VisConfig | Mapping[str, Any] | None = None) -> VisResult:
    """Draw an embedding file, measure it, and write the explorer page.

    Writes `output_path` (PNG), and beside it `.json` (all numbers) and `.html` (the page).

    :raises MissingError: there is no embedding file.
    :raises DataError: it cannot be read, or has no such column.
    :raises ConfigError: one of these would replace a file that is read.
    """
    config = VisConfig.resolve(config)
    require("view")
    _check_places(config)
    items, old = _read(config)
    _say_absent_fonts(config)
    health = health_of(items, config.seed)
    labels = _labels(items, config)
    wanted = len(labels.names) if labels and len(labels.names) <= SCORED else 0
    clusters = measure.find_clusters(items.unit, config.clusters, wanted, config.seed)
    groups = labels if labels and labels.names else _cluster_groups(clusters)
    maps, maps_before = _maps(items, old, groups, config)
    now = _Side(items, maps, measured(items, labels, clusters, maps, health))
    before = None
    if old and maps_before:
        clusters_before = measure.find_clusters(old.unit, clusters.k, 0, config.seed)
        health = health_of(old, config.seed)
        before = _Side(old, maps_before, measured(old, labels, clusters_before, maps_before, health))
    then = before.numbers if before else None
    tables = tables_of(items, maps, now.numbers, labels, maps_before=maps_before, before=then)
    for table in tables.values():
        logger.info("%s", as_text(_head(table)), extra=RESULT)
    return _written(config, now, before, groups, tables)


def _check_places(config: VisConfig) -> None:
    """Make sure, before the work, that what is written beside the picture too replaces nothing that is read."""
    picture = Path(config.output_path)
    check_output_file(picture)
    files = [file for path in (config.embedding_path, config.compare_path) if path for file in files_of(path)]
    beside = [picture.with_suffix(ending) for ending in BESIDE]
    check_apart([picture, *beside], [*files, config.chinese_fonts, config.presets])


def _read(config: VisConfig) -> tuple[Items, Items | None]:
    """The items of the file, and as they were in the file to compare it with."""
    text = _text_column(columns_in(config.embedding_path), config)
    if config.compare_path is None:
        return read_items(config.embedding_path, config.label_column, text, None), None
    return read_both(
        config.embedding_path, config.compare_path, label=config.label_column, text=text, key=config.id_column
    )


def _labels(items: Items, config: VisConfig) -> Groups | None:
    if not config.label_column:
        return None
    labels = groups_of(items.labels, config.label_column)
    if len(labels.names) > SCORED:
        logger.warning(
            "%s has %d different values: rather an id than a label; the largest %d are scored",
            labels.title, len(labels.names), SCORED,
        )  # fmt: skip
    return labels


def _maps(items: Items, old: Items | None, groups: Groups, config: VisConfig) -> tuple[Maps, Maps | None]:
    """The maps of the items, and those of before that they are drawn from."""
    place = Path(config.output_path).with_suffix(MAPS)
    cache = projection.Cache(place if config.cache and not config.fast else None)
    sample = sampled(items.unit, groups, config.max_points, config.seed, cache)
    asked = _asked(config)
    before = project(old.unit, sample, asked, cache, seed=config.seed) if old else None
    maps = project(items.unit, sample, asked, cache, seed=config.seed, before=before)
    cache.save()
    return maps, before


def _asked(config: VisConfig) -> dict[str, dict[str, Any]]:
    """The methods that are wanted, and their settings."""
    settings: dict[str, dict[str, Any]] = {
        "tsne": {
            "perplexity": config.tsne_perplexity,
            "learning_rate": config.tsne_learning_rate,
            "seed": config.seed,
        },
        "umap": {
            "n_neighbors": config.umap_neighbors,
            "min_dist": config.umap_min_dist,
            "seed": None if config.fast else config.seed,
        },
    }
    return settings if config.method == "both" else {config.method: settings[config.method]}


def _written(
    config: VisConfig, now: _Side, before: _Side | None, groups: Groups, tables: Mapping[str, DataFrame]
) -> VisResult:
    """Write the picture, its numbers, its config and the page."""
    picture = Path(config.output_path)
    numbers_path, page = picture.with_suffix(NUMBERS), picture.with_suffix(PAGE) if config.explorer else None
    panels = list(_panels(now.maps, before.maps if before else None))
    caption = _caption(now, before, groups, seed=config.seed)
    visualize_figure.draw(picture, panels, groups, title=_title(config), caption=caption, fonts=config.chinese_fonts)
    content = _content(config, now, before, groups, tables)
    write_json(numbers_path, content)
    config.save(picture.with_suffix(CONFIG))
    if page:
        _explore(page, now, before, panels, groups, config=config)
    logger.info("wrote %s", ", ".join(str(path) for path in (picture, page, numbers_path) if path))
    return VisResult(picture, page, numbers_path, content, dict(tables))


def _say_absent_fonts(config: VisConfig) -> None:
    """Of the fonts that somebody named; the default names those of every system."""
    named = [name for name in config.chinese_fonts if name not in VisConfig().chinese_fonts]
    if absent := fonts.absent_fonts(named):
        logger.warning("chinese_fonts: there is no font %s here; others are taken", ", ".join(absent))


def _text_column(names: Sequence[str], config: VisConfig) -> str | None:
    if config.text_column is not None:
        return config.text_column
    rest = [name for name in names if name not in (config.label_column, config.id_column)]
    return next(iter([name for name in rest if name == "description"] + rest), config.label_column)


def _cluster_groups(found: measure.Clusters) -> Groups:
    names = [f"cluster {i + 1}" for i in range(found.k)]
    return Groups(found.codes, names, found.sizes, NO_LABEL_TITLE)


def _panels(maps: Maps, before: Maps | None) -> Iterator[Panel]:
    sides = [(before, "before"), (maps, "after")] if before else [(maps, "")]
    methods = list(maps.coords)
    if not any(side.settings[method] for side, _ in sides if side for method in methods):
        methods = methods[:1]  # PCA draws both alike
    for method in methods:
        for space, (side, which) in enumerate(sides):
            assert side is not None
            name = side.name_of(method)
            note = _note(side.quality[method])
            yield Panel(f"{name}: {which}" if which else name, side.coords[method], note, space)


def _note(quality: projection.MapQuality) -> str:
    if math.isnan(quality.trustworthiness):
        return "trustworthiness not measurable"
    return f"trustworthiness {quality.trustworthiness:.3f}, neighbours kept {quality.neighbours_kept:.1%}"


def _explore(
    path: Path, now: _Side, before: _Side | None, panels: Sequence[Panel], groups: Groups, *, config: VisConfig
) -> None:
    """Write the page of up to 50,000 of the projected points; its spaces are those that the panels are maps of."""
    projected = now.maps.rows
    chosen = projection.sample_rows(groups.codes[projected], explorer.MOST, config.seed)
    rows = projected[chosen]
    explorer.write_explorer(
        path,
        [dataclasses.replace(panel, coords=panel.coords[rows]) for panel in panels],
        dataclasses.replace(groups, codes=groups.codes[rows]),
        texts=[now.items.texts[row] for row in rows],
        spaces=[
            _neighbourhood(side.items.unit[rows], _near_drawn(side.maps.near, chosen)) for side in (before, now) if side
        ],
        name=_title(config),
        all_rows=len(now.items),
    )


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


def _caption(now: _Side, before: _Side | None, groups: Groups, *, seed: int) -> str:
    n, drawn = len(now.items), len(now.maps.rows)
    sample = f"All {n:,} vectors were projected (seed {seed})."
    if drawn < n:
        sample = (
            f"{drawn:,} of {n:,} vectors were projected (sampled by {now.maps.sampled_by}, seed {seed}); "
            "the rest lie where their nearest projected neighbours do."
        )
    trust = (
        f"Neighbours kept: {meaning_of_kept(now.maps, before.maps if before else None)}. "
        "Distances between groups on a map mean little; the numbers are from the original space."
    )
    numbers = _captioned(now.numbers, before.numbers if before else None)
    left_out = _left_out(now.items, before.items if before else None, groups)
    return "\n".join(filter(None, [f"{sample} {trust}", left_out, numbers]))


def _left_out(items: Items, old: Items | None, groups: Groups) -> str:
    """How many rows of the files are not on the map, grey on it, or not in the numbers."""
    sides = [(" in the new file", items), (" in the old file", old)] if old else [("", items)]
    counts = [
        *((side.without_vector, f"without a vector{where} are not drawn") for where, side in sides),
        *((side.zero, f"with a vector of zeros{where} are not drawn") for where, side in sides),
        (groups.without, f"without {groups.title} are grey"),
        (sum(groups.counts[SCORED:]), f"have a smaller {groups.title} than the largest {SCORED:,} and are not scored"),
    ]
    n, missing = len(items), items.unmatched + (old.unmatched if old else 0)
    shared = f"{n:,} of {n + missing:,} items are in both files." if missing else ""
    return " ".join(filter(None, [shared, *(f"{count:,} rows {what}." for count, what in counts if count)]))


def _captioned(numbers: Numbers, before: Numbers | None) -> str:
    now, then = numbers.short(), before.short() if before else None
    shown = [name for name in CAPTIONED if name in now and (then is None or name in then)]
    if not shown:
        return ""
    told = {name: f"{then[name].value:.3f} → " if then else "" for name in shown}
    parts = []
    for rows, names in itertools.groupby(shown, key=lambda name: now[name].rows):
        of = f" (of {rows:,} rows)" if rows < len(numbers.clusters.codes) else ""
        parts.append(", ".join(f"{name} {told[name]}{now[name].value:.3f}" for name in names) + of)
    return f"In the original space{', before → after' if then else ''}: {', '.join(parts)}."


def _content(
    config: VisConfig, now: _Side, before: _Side | None, groups: Groups, tables: Mapping[str, DataFrame]
) -> dict[str, Any]:
    """All numbers as plain values for JSON."""
    content = {
        "config": config.to_dict(),
        "rows": len(groups.codes),
        "projected": len(now.maps.rows),
        "unmatched": now.items.unmatched if before else None,
        "unmatched_before": before.items.unmatched if before else None,
        "health": dataclasses.asdict(now.numbers.health),
        "health_before": dataclasses.asdict(before.numbers.health) if before else None,
        "maps": _map_content(now.maps),
        "maps_before": _map_content(before.maps) if before else None,
        "numbers": _number_content(now.numbers),
        "before": _number_content(before.numbers) if before else None,
        "groups": {"by": groups.title, "without": groups.without,
                   "sizes": dict(zip(groups.names, groups.counts, strict=True))},
        "meanings": {name: {"better": better, "meaning": what} for name, better, what in tables["meanings"].to_numpy()},
        "tables": [_table_content(table) for name, table in tables.items() if name not in ("numbers", "meanings")],
    }  # fmt: skip
    return _plain(content)


def _map_content(maps: Maps) -> dict[str, Any]:
    return {m: dataclasses.asdict(quality) | maps.settings[m] for m, quality in maps.quality.items()}


def _table_content(table: DataFrame) -> dict[str, Any]:
    return {"title": table.attrs["title"], "rows": table.to_dict("records")}


def _number_content(numbers: Numbers) -> dict[str, Any]:
    return {
        name: {"value": number.value, "rows": number.rows, "better": better, "meaning": meaning}
        for name, number in numbers.short().items()
        for better, meaning in [MEANINGS[name]]
    }


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no numpy."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
