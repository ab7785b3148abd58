"""The interactive page: one file without network access, to hover, search, select, colour and follow neighbours."""

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
from ebr_lib.visualize.columns import Column
from ebr_lib.visualize.groups import DARK_PALETTE, OPACITY, PALETTE, Groups, Panel
from ebr_lib.visualize.labels import cores_of

MOST = 50_000  # points that a browser draws without a pause
TEXT_ROOM = 20_000_000  # characters of all texts: 400 for each of 50,000 points, more if others are shorter
PAGE = Path(__file__).with_name("page")
SCRIPTS = ("data.js", "paint.js", "lists.js", "hands.js")  # one script, in this order


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
    columns: Sequence[Column],
    *,
    colour: str,
    text: str,
    title: str | None = None,
    spaces: Sequence[Neighbourhood],
    name: str,
    all_rows: int,
) -> None:
    """Write the page.

    :param panels: maps of the points, n × 2 each; a panel's `space` is a position in `spaces`.
    :param columns: what hovering shows and rows are exported with; `colour` names the one that colours at first, `text`
        the one with the text, `title` one with a short title.
    :param spaces: the neighbours of each point, per original space.
    :param all_rows: rows of the file, of which the points may be a sample.
    """
    longest = _longest([len(_one_line(v)) for c in columns if c.groups is None for v in c.values], TEXT_ROOM)
    names = [column.name for column in columns]
    data = {
        "name": name,
        "all": all_rows,
        "points": len(panels[0].coords),
        "palettes": {"light": PALETTE, "dark": DARK_PALETTE},
        "opacity": OPACITY,
        "columns": [_packed_column(column, panels, longest) for column in columns],
        "colour": names.index(colour),
        "text": names.index(text),
        "title": None if title is None else names.index(title),
        "maps": [
            {"name": p.title, "note": p.note, "space": p.space, "coords": _packed(p.coords, np.float32)} for p in panels
        ],
        "spaces": [
            {"near": _packed(s.near, np.int32), "cosines": _packed(np.rint(s.cosines * 10_000), np.int16)}
            for s in spaces
        ],
        "longest": longest
        if any(len(_one_line(v)) > longest for c in columns if not c.groups for v in c.values)
        else None,
    }
    # with `<` escaped, no text can end the script element or open a comment in it
    harmless = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _part("page.html").replace("/*CSS*/", _part("page.css"))
    page = page.replace("/*SCRIPT*/", "\n".join(map(_part, SCRIPTS))).replace("/*DATA*/", harmless)
    with written_whole(path) as new:
        new.write_text(page, encoding="utf-8")


def _part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _packed_column(column: Column, panels: Sequence[Panel], longest: int) -> dict[str, Any]:
    """A column as the page reads it: labels as codes with a core on each map, anything else as texts."""
    if column.groups is not None:
        cores = [cores_of(panel.coords, column.groups) for panel in panels]
        groups: Groups = column.groups if column.groups.spread is not None else column.groups.spread_out(cores[0])
        return {
            "name": column.name,
            "kind": "label",
            "labels": groups.names,
            "codes": _packed(groups.codes, np.int32),
            "colours": groups.colours.tolist(),
            "cores": [_packed(core, np.float32) for core in cores],
        }
    texts = map(_one_line, column.values)
    cut = [text if len(text) <= longest else text[:longest] + "…" for text in texts]
    return {"name": column.name, "kind": "number" if column.is_number else "text", "texts": cut}


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


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
