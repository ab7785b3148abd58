"""The interactive page: one file without network access, to hover, search, filter and follow neighbours."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebr_lib.arrays import Ints
from ebr_lib.files import written_whole
from ebr_lib.visualize.groups import Groups, Panel

MOST = 50_000  # points that a browser draws without a pause
TEXT_ROOM = 20_000_000  # characters of all texts: 400 for each of 50,000 points, more if others are shorter
TEMPLATE = Path(__file__).with_name("explorer.html")


@dataclass(frozen=True)
class Neighbourhood:
    """Nearest neighbours of each point in an original space.

    :param near: positions among the points, n × k, nearest first; -1 if it is not drawn.
    :param cosines: cosine of each of them.
    """

    near: Ints
    cosines: NDArray[np.float32]


def write_explorer(
    path: Path,
    panels: Sequence[Panel],
    groups: Groups,
    *,
    texts: Sequence[str | None],
    spaces: Sequence[Neighbourhood],
    name: str,
    all_rows: int,
) -> None:
    """Write the page.

    :param panels: maps of the points, n × 2 each; a panel's `space` is a position in `spaces`.
    :param groups: labels of the points; hovering shows `texts`.
    :param spaces: the neighbours of each point, per original space.
    :param all_rows: rows of the file, of which the points may be a sample.
    """
    whole = [" ".join((text or "").split()) for text in texts]
    longest = _longest([len(text) for text in whole], TEXT_ROOM)
    data = {
        "name": name,
        "all": all_rows,
        "title": groups.title,
        "labels": groups.names,
        "colours": groups.shade_colours,  # of the largest labels, of all others, of rows without a label
        "maps": [
            {"name": p.title, "note": p.note, "space": p.space, "coords": _packed(p.coords, np.float32)} for p in panels
        ],
        "codes": _packed(groups.codes, np.int32),
        "spaces": [
            {"near": _packed(s.near, np.int32), "cosines": _packed(np.rint(s.cosines * 10_000), np.int16)}
            for s in spaces
        ],
        "texts": [text if len(text) <= longest else text[:longest] + "…" for text in whole],
        "longest": longest if any(len(text) > longest for text in whole) else None,
    }
    # with `<` escaped, no text can end the script element or open a comment in it
    harmless = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", harmless)
    with written_whole(path) as new:
        new.write_text(page, encoding="utf-8")


def _longest(lengths: Sequence[int], room: int) -> int:
    """Largest length at which all texts fit; short texts leave their share to long ones."""
    for done, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - done)
        if length > share:
            return share
        room -= length
    return max(lengths, default=0)


def _packed(values: NDArray[Any], kind: type[np.generic]) -> str:
    little = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode()
