"""Which knobs would probably make rejected rows readable, judged from the rows themselves."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ebr_lib.data.embeddings.base import DELIMITER
from ebr_lib.data.fields import LOOSE_QUOTE
from ebr_lib.data.hive import OPEN_QUOTE, Layout

HINT_ROWS = 1000
LINES = 5  # that an error names
SIGNS = {b"\x01": "\\001", b"\t": "\\t", b",": ",", b"|": "|", b";": ";"}
WIDTH = re.compile(r"(\d+) fields, wanted (\d+)")


class Reject(NamedTuple):
    """A row of a reject file."""

    file: bytes
    line: int
    reason: str
    raw: bytes


def read_rejects(files: Iterable[Path]) -> list[Reject]:
    """The first rows of reject files; of a row of several lines, the first line."""
    rows = (fields for file in files for fields in _fields(file))
    return [Reject(f[0], int(f[1]), f[3].decode(), f[4]) for f in itertools.islice(rows, HINT_ROWS)]


def _fields(path: Path) -> Iterator[list[bytes]]:
    with open(path, "rb") as file:
        file.readline()
        for line in file:
            fields = line.removesuffix(b"\n").split(DELIMITER, 4)
            if len(fields) == 5 and fields[1].isdigit() and fields[2].isdigit():
                yield fields


def likely_knobs(rejects: Sequence[Reject], layout: Layout, given: Sequence[str] = ()) -> list[str]:
    """What would probably help, likeliest first, each with the flag to give.

    :param given: columns that the input's folders give, such as `dt`.
    """
    found = [*_broken_quotes(rejects), *_widths(rejects, layout, given)]
    if layout.encoding == "auto" and any(reject.reason.startswith("not utf-8") for reject in rejects):
        found.append("they may be GB18030: set encoding to gb18030 (--encoding gb18030)")
    return found


def first_lines(rejects: Sequence[Reject]) -> str:
    """Where the first rejects are: `a.csv, line 2, 5, 8 …`."""
    if not rejects:
        return ""
    lines = [str(reject.line) for reject in rejects if reject.file == rejects[0].file]
    more = " …" if len(rejects) > LINES else ""
    return f"{rejects[0].file.decode(errors='replace')}, line {', '.join(lines[:LINES])}{more}"


def _broken_quotes(rejects: Sequence[Reject]) -> Iterator[str]:
    broken = [reject.raw for reject in rejects if reject.reason in (OPEN_QUOTE, LOOSE_QUOTE)]
    if broken and 2 * sum(b'\\"' in raw for raw in broken) >= len(broken):
        yield "the quotes in them are escaped: --escaped_by '\\\\'"
    elif broken:
        yield "quotes in them are ordinary characters: --quoting none"


def _widths(rejects: Sequence[Reject], layout: Layout, given: Sequence[str]) -> Iterator[str]:
    """Hints for rows of too many or too few fields."""
    odd = [(reject, int(m[1]), int(m[2])) for reject in rejects if (m := WIDTH.fullmatch(reject.reason))]
    if not odd:
        return
    raws, wanted = [reject.raw for reject, *_ in odd], odd[0][2]
    widths = Counter(width for _, width, _ in odd)
    usual, count = widths.most_common(1)[0]
    twice = [name for name in layout.columns or () if name in given]
    if twice and usual == wanted - len(twice):
        yield f"the folders give {', '.join(twice)}, the files do not hold it: leave it out of columns"
    elif layout.escape is None and _most(raws, lambda raw: _is_escaped(raw, layout.delimiter)):
        yield "a backslash escapes in them (ESCAPED BY): --escaped_by '\\\\'"
    elif _most(raws, lambda raw: _is_quoted(raw, layout.delimiter)):
        yield "they hold fields in quotes: --quoting csv"
    elif usual == 1 and (sign := _other_sign(raws, wanted)):
        yield f"another sign separates their fields: --delimiter '{SIGNS[sign]}'"
    elif not layout.heal and _broken_by_newlines(odd, wanted):
        yield "newlines inside fields broke them: --heal_rows true"
    elif layout.delimiter == b"," and usual > wanted:
        yield "they hold a comma inside a field: put such fields in quotes, or export with another delimiter"
    elif usual > 1 and 2 * count > widths.total():
        kind = "more" if usual > wanted else "fewer"
        yield (
            f"most of them have {usual} fields, {kind} than the {wanted} that the header or columns name; did the "
            "table change? Name the columns of these files (--columns …), and encode them apart from the others"
        )


def _most(raws: Sequence[bytes], is_one: Callable[[bytes], bool]) -> bool:
    return 2 * sum(map(is_one, raws)) >= len(raws)


def _is_escaped(raw: bytes, delimiter: bytes) -> bool:
    return b"\\" + delimiter in raw or (len(raw) - len(raw.rstrip(b"\\"))) % 2 == 1


def _is_quoted(raw: bytes, delimiter: bytes) -> bool:
    return raw.startswith(b'"') or raw.endswith(b'"') or delimiter + b'"' in raw or b'"' + delimiter in raw


def _other_sign(raws: Sequence[bytes], wanted: int) -> bytes | None:
    return next((sign for sign in SIGNS if wanted > 1 and _most(raws, lambda r: r.count(sign) == wanted - 1)), None)  # noqa: B023


def _broken_by_newlines(odd: Sequence[tuple[Reject, int, int]], wanted: int) -> bool:
    """Whether consecutive lines would make a row together."""
    pairs = itertools.pairwise(odd)
    joined = sum(a.file == b.file and a.line + 1 == b.line and n + m - 1 == wanted for (a, n, _), (b, m, _) in pairs)
    return 4 * joined >= len(odd)
