"""The points of the explorer page as a Parquet file, which other viewers of embeddings open.

embedding-atlas opens it with `embedding-atlas FILE --text text --x x --y y --neighbors neighbours`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebr_lib.files import written_whole
from ebr_lib.visualize.explorer import Neighbourhood
from ebr_lib.visualize.groups import Panel


def write_points(
    path: Path,
    *,
    ids: Sequence[Any],
    texts: Sequence[str | None],
    labels: Sequence[str | None],
    panels: Sequence[Panel],
    space: Neighbourhood,
    columns: Mapping[str, Sequence[str | None]],
) -> None:
    """Write one row per point: id, text, label, place on each map, neighbours, then the kept columns.

    :param panels: `x`, `y` are places on the first; those on the others are `x2`, `y2` and so on.
    :param space: the neighbours, written as `{ids, distances}`: row numbers from 0, nearest first, and 1 − cosine.
    :param columns: kept columns; one whose name is taken gets `_` at its end.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table: dict[str, Any] = {"id": [str(id_) for id_ in ids], "text": list(texts), "label": list(labels)}
    for number, panel in enumerate(panels, 1):
        for axis, name in enumerate("xy"):
            table[name if number == 1 else f"{name}{number}"] = np.asarray(panel.coords[:, axis], np.float32)
    kind = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])
    drawn = space.near >= 0
    near = [
        {"ids": ids_[some], "distances": 1 - cosines[some]}
        for ids_, cosines, some in zip(space.near, space.cosines, drawn, strict=True)
    ]
    table["neighbours"] = pa.array(near, kind)
    for name, values in columns.items():
        table[name if name not in table else f"{name}_"] = list(values)
    with written_whole(path) as new:
        pq.write_table(pa.table(table), new)
