"""Stage 3: see the embedding. A picture to trust, numbers to act on, and a page to look around in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from ebr_lib.arrays import Ints
from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.data.embeddings.files import files_of
from ebr_lib.extras import require
from ebr_lib.files import check_apart, check_output_file, write_json
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.provenance import Provenance
from ebr_lib.tables import TableRepr, as_text, html_folded, html_page, html_picture, html_verdict
from ebr_lib.visualize import clusters as measure
from ebr_lib.visualize import explorer, fonts, projection
from ebr_lib.visualize import figure as visualize_figure
from ebr_lib.visualize.columns import IDS, TITLES, Column, column_of, labels_column, usual_column
from ebr_lib.visualize.config import VisConfig
from ebr_lib.visualize.groups import SHOWN, Groups, Panel, groups_of
from ebr_lib.visualize.keywords import cluster_words
from ebr_lib.visualize.labelled_vectors import LabelledVectors, columns_in, read_both, read_labelled, text_column_in
from ebr_lib.visualize.labels import cores_of
from ebr_lib.visualize.maps import NEAR, Maps, project, sampled
from ebr_lib.visualize.points import write_points
from ebr_lib.visualize.summary import MEANINGS, SCORED, Numbers, Side, caption_of, health_of, measured, tables_of

NUMBERS, CONFIG, PAGE, POINTS, MAPS = BESIDE = (
    ".json",
    ".yaml",
    ".html",
    ".parquet",
    ".maps.npz",
)  # endings of the files beside the picture
LISTED = 20  # rows of a table that are shown
SCREEN = 720  # pixels that a notebook shows the picture in; the file has all of its own
NO_LABEL_TITLE = "k-means cluster"


@dataclass(frozen=True, repr=False)
class VisResult(TableRepr):
    """What the stage wrote and measured.

    :param picture: the PNG, SVG or PDF. The config is beside it, as `.yaml`.
    :param explorer: the interactive page, or None.
    :param numbers_path: the JSON with all numbers; `numbers` is its content.
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
        return "\n\n".join([f"wrote {', '.join(written)}", *(as_text(_head(t)) for t in self.tables.values())])

    def _repr_html_(self) -> str:
        return "".join([
            html_verdict(self.verdict),
            html_picture(self.picture, "maps", height=SCREEN),
            html_page(self.explorer, "交互图 explorer", 760) if self.explorer else "",
            html_folded(map(_head, self.tables.values()), "全部数字 all numbers"),
        ])  # fmt: skip

    @property
    def verdict(self) -> str:
        """The number that says most, in one sentence."""
        now, before = self.numbers["numbers"], self.numbers["before"] or {}
        name = "same label @10" if "same label @10" in now else "k-means silhouette"
        if name not in now:
            return f"{self.numbers['rows']} 行 rows"
        was = f"{before[name]['value']:.3f} → " if name in before else ""
        chance = f" (随机 chance {now['chance']['value']:.3f})" if "chance" in now else ""
        what = "最近 10 行中同标签的比例 share of the 10 nearest rows with the row's own label"
        said = what if name == "same label @10" else "k-means 轮廓系数 silhouette of k-means clusters"
        return f"{said}: {was}{now[name]['value']:.3f}{chance if name == 'same label @10' else ''}"


def _head(table: DataFrame) -> DataFrame:
    """The rows that are shown; the JSON has all."""
    head = table.head(LISTED)
    if len(head) < len(table):
        head.attrs["title"] += f": the first {LISTED} of {len(table)}"
    return head


# --- the stage ----------------------------------------------------------------------------------------------------


def visualize_embeddings(config: VisConfig | Mapping[str, Any] | None = None) -> VisResult:
    """Draw an embedding file, measure it, and write the explorer page.

    Writes `output_path`, and beside it `.json` (all numbers), `.yaml` (the config), `.html` (the page) and `.parquet`
    (the page's points).

    :raises MissingError: the embedding file does not exist.
    :raises DataError: it cannot be read, or lacks a column.
    :raises ConfigError: an output would replace a file that is read.
    """
    config = VisConfig.resolve(config)
    require("view")
    _check_places(config)
    vectors, old = _read(config)
    # only of fonts that the user named; the default names those of every system
    named = [name for name in config.chinese_fonts if name not in VisConfig().chinese_fonts]
    if absent := fonts.absent_fonts(named):
        logger.warning("chinese_fonts: 没有字体 no font %s here; using others", ", ".join(absent))
    health = health_of(vectors, config.seed)
    labels = _labels(vectors, config.label_column)
    wanted = len(labels.names) if labels and len(labels.names) <= SCORED else 0
    clusters = measure.find_clusters(vectors.unit, config.clusters, wanted, config.seed)
    clusters = dataclasses.replace(clusters, words=cluster_words(vectors.texts, clusters.codes, clusters.k))
    groups = labels if labels and labels.names else _cluster_groups(clusters)
    maps, maps_before = _maps(vectors, old, groups, config)
    now = Side(vectors, maps, measured(vectors, labels, clusters, maps, health))
    before = None
    if old and maps_before:
        clusters_before = measure.find_clusters(old.unit, clusters.k, 0, config.seed)
        health = health_of(old, config.seed)
        before = Side(old, maps_before, measured(old, labels, clusters_before, maps_before, health))
    tables = tables_of(now, before, labels)
    for table in tables.values():
        logger.info("%s", as_text(_head(table)), extra=RESULT)
    return _written(config, now, before, groups, tables)


def _check_places(config: VisConfig) -> None:
    """Check, before the work, that no output replaces a file that is read."""
    picture = Path(config.output_path)
    check_output_file(picture)
    files = [file for path in (config.embedding_path, config.compare_path) if path for file in files_of(path)]
    beside = [picture.with_suffix(ending) for ending in BESIDE]
    check_apart([picture, *beside], [*files, config.chinese_fonts, config.presets])


def _read(config: VisConfig) -> tuple[LabelledVectors, LabelledVectors | None]:
    """The vectors of the file, and those of the same rows in the file to compare with."""
    path, label = config.embedding_path, config.label_column
    text = config.text_column or text_column_in(path)
    kept = columns_in(path) if config.explorer else []
    if config.compare_path is None:
        return read_labelled(path, label, text, None, kept), None
    return read_both(path, config.compare_path, label=label, text=text, key=config.id_column, kept=kept)


def _labels(vectors: LabelledVectors, column: str | None) -> Groups | None:
    if not column:
        return None
    labels = groups_of(vectors.labels, column)
    if len(labels.names) > SCORED:
        logger.warning(
            "标签过多 %s has %d different values: probably an id, not a label; the largest %d are scored",
            column, len(labels.names), SCORED,
        )  # fmt: skip
    return labels


def _cluster_groups(found: measure.Clusters) -> Groups:
    names = [f"{i + 1}: {words}" if words else f"cluster {i + 1}" for i, words in enumerate(found.words)]
    return Groups(found.codes, names, found.sizes, NO_LABEL_TITLE)


def _maps(
    vectors: LabelledVectors, old: LabelledVectors | None, groups: Groups, config: VisConfig
) -> tuple[Maps, Maps | None]:
    """The maps, and those of the old vectors that they start from."""
    place = Path(config.output_path).with_suffix(MAPS)
    cache = projection.Cache(place if config.cache and not config.fast else None)
    sample = sampled(vectors.unit, groups, config.max_points, config.seed, cache)
    asked: dict[str, dict[str, Any]] = {
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
    if config.method != "both":
        asked = {config.method: asked[config.method]}
    before = project(old.unit, sample, asked, cache, seed=config.seed) if old else None
    maps = project(vectors.unit, sample, asked, cache, seed=config.seed, before=before)
    cache.save()
    return maps, before


# --- writing ------------------------------------------------------------------------------------------------------


def _written(
    config: VisConfig, now: Side, before: Side | None, groups: Groups, tables: dict[str, DataFrame]
) -> VisResult:
    """Write the picture, its numbers, its config and the page."""
    picture = Path(config.output_path)
    numbers_path, page = picture.with_suffix(NUMBERS), picture.with_suffix(PAGE) if config.explorer else None
    title = _title(config, len(now.vectors))
    panels = list(_panels(now.maps, before.maps if before else None))
    if len(groups.names) > SHOWN:
        groups = groups.spread_out(cores_of(panels[-1].coords, groups))
    caption = caption_of(now, before, groups, config.seed)
    visualize_figure.draw(picture, panels, groups, title=title, caption=caption, fonts=config.chinese_fonts)
    content = _content(config, now, before, groups, tables)
    write_json(numbers_path, content)
    config.save(picture.with_suffix(CONFIG))
    if page:
        _explore(page, now, before, panels, groups, title=title, seed=config.seed)
    logger.info("已保存 wrote %s", ", ".join(str(path) for path in (picture, page, numbers_path) if path))
    return VisResult(picture, page, numbers_path, content, tables)


def _title(config: VisConfig, n: int) -> str:
    """The model, or both, the data and the number of items, as far as manifests say."""
    manifest = read_manifest(config.embedding_path) or {}
    files = [path for path in (config.compare_path, config.embedding_path) if path]
    # a file's own name where no manifest has the model's
    models = [Path(Provenance.of(read_manifest(path) or {}).name or path).name for path in files]
    inputs = [Path(file["path"]).name for file in manifest.get("inputs", [])]
    data = inputs[0] if inputs else ""
    if len(inputs) > 1:
        data += f" and {len(inputs) - 1} more"
    return " · ".join(filter(None, [" → ".join(models), data, f"{n:,} items"]))


def _panels(maps: Maps, before: Maps | None) -> Iterator[Panel]:
    sides = [(before, ": before"), (maps, ": after")] if before else [(maps, "")]
    methods = list(maps.coords)
    if not any(side.settings[method] for side, _ in sides for method in methods):
        methods = methods[:1]  # PCA draws both alike
    for method in methods:
        for space, (side, which) in enumerate(sides):
            trust, kept = side.quality[method].trustworthiness, side.quality[method].neighbours_kept
            note = f"trustworthiness {trust:.3f}, neighbours kept {kept:.1%}"
            if math.isnan(trust):
                note = "trustworthiness not measurable"
            yield Panel(side.name_of(method) + which, side.coords[method], note, space)


def _explore(
    path: Path, now: Side, before: Side | None, panels: Sequence[Panel], groups: Groups, *, title: str, seed: int
) -> None:
    """Write the page of up to 50,000 of the projected points, and its points; its spaces are those of the panels."""
    projected = now.maps.rows
    chosen = projection.sample_rows(groups.codes[projected], explorer.MOST, seed)
    rows = projected[chosen]
    spaces = []
    for side in (before, now) if before else (now,):
        near = _near_drawn(side.maps.near, chosen)
        cosines = measure.neighbour_cosines(side.vectors.unit[rows], np.maximum(near, 0))
        spaces.append(explorer.Neighbourhood(near, cosines))
    drawn = [dataclasses.replace(panel, coords=panel.coords[rows]) for panel in panels]
    vectors = now.vectors.take(rows)
    shown = dataclasses.replace(groups, codes=groups.codes[rows])
    columns, text = _page_columns(vectors, shown, now.numbers.clusters, rows)
    explorer.write_explorer(
        path,
        drawn,
        columns,
        colour=shown.title,
        text=text,
        title=usual_column([name for name in vectors.columns if name not in (text, shown.title)], TITLES),
        spaces=spaces,
        name=title,
        all_rows=len(now.vectors),
    )
    ids = usual_column(vectors.columns, IDS)
    write_points(
        path.with_suffix(POINTS),
        ids=vectors.columns[ids] if ids else vectors.keys,
        texts=vectors.texts,
        labels=labels_column(shown).values,
        panels=drawn,
        space=spaces[-1],
        columns={name: values for name, values in vectors.columns.items() if name not in (ids, text, shown.title)},
    )


def _page_columns(
    vectors: LabelledVectors, groups: Groups, clusters: measure.Clusters, rows: Ints
) -> tuple[list[Column], str]:
    """The kept columns in their order, labels and clusters among them, and the name of the text's column."""
    own = labels_column(groups)
    text = next(name for name, values in vectors.columns.items() if values == vectors.texts)
    columns = [
        own if name == groups.title else Column(name, values) if name == text else column_of(name, values)
        for name, values in vectors.columns.items()
    ]
    if groups.title not in vectors.columns:
        columns.insert(0, own)
    elif NO_LABEL_TITLE not in vectors.columns:
        found = _cluster_groups(clusters)
        columns.append(labels_column(dataclasses.replace(found, codes=found.codes[rows])))
    return columns, text


def _near_drawn(near: Ints, chosen: Ints) -> Ints:
    """Neighbours as places among the chosen points: the nearest ten that are chosen, -1 if there are fewer."""
    place = np.full(len(near), -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    found = place[near[chosen]]
    order = np.argsort(found < 0, axis=1, kind="stable")[:, :NEAR]
    return np.take_along_axis(found, order, 1)


def _content(
    config: VisConfig, now: Side, before: Side | None, groups: Groups, tables: Mapping[str, DataFrame]
) -> dict[str, Any]:
    """All numbers as plain values for JSON."""
    content = {
        "config": config.to_dict(),
        "rows": len(groups.codes),
        "projected": len(now.maps.rows),
        "unmatched": now.vectors.unmatched if before else None,
        "unmatched_before": before.vectors.unmatched if before else None,
        "health": dataclasses.asdict(now.numbers.health),
        "health_before": dataclasses.asdict(before.numbers.health) if before else None,
        "maps": _map_content(now.maps),
        "maps_before": _map_content(before.maps) if before else None,
        "numbers": _number_content(now.numbers),
        "before": _number_content(before.numbers) if before else None,
        "groups": {"by": groups.title, "without": groups.without,
                   "sizes": dict(zip(groups.names, groups.counts, strict=True))},
        "meanings": tables["meanings"].set_index("column").to_dict("index"),
        "tables": [
            {"title": table.attrs["title"], "rows": table.to_dict("records")}
            for name, table in tables.items() if name not in ("numbers", "meanings")
        ],
    }  # fmt: skip
    return _plain(content)


def _map_content(maps: Maps) -> dict[str, Any]:
    return {m: dataclasses.asdict(quality) | maps.settings[m] for m, quality in maps.quality.items()}


def _number_content(numbers: Numbers) -> dict[str, Any]:
    return {
        name: dataclasses.asdict(number) | dict(zip(("better", "meaning"), MEANINGS[name], strict=True))
        for name, number in numbers.short().items()
    }


def _plain(value: Any) -> Any:
    """Plain values: JSON has no NaN and no numpy numbers."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
