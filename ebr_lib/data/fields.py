"""Fields of delimited rows with quotes (RFC 4180) or an escape character (Hive's ESCAPED BY), bytes in and bytes out.

A quoted field begins and ends with `"`, holds delimiters and newlines as they are, and `""` for a quote. An escape
character takes the next character literally, except `n` and `r`: newline and carriage return, as in Hive. `\\N` alone
is null. A record may span several lines, so it is parsed line by line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

NULL = b"\\N"
ESCAPED = {b"n": b"\n", b"r": b"\r"}
LOOSE_QUOTE = "a letter after a closing quote"


@dataclass(frozen=True)
class Dialect:
    """How the fields of a row are separated.

    :param delimiter: one byte between the fields.
    :param quoted: fields may be quoted.
    :param escape: one byte that takes the next one literally; None for no escaping.
    """

    delimiter: bytes
    quoted: bool
    escape: bytes | None = None

    @property
    def is_plain(self) -> bool:
        """Whether rows are only split at the delimiter."""
        return not self.quoted and self.escape is None

    def marks(self, line: bytes) -> bool:
        """Whether a line has a quote or an escape, so that it needs more than splitting."""
        return (self.quoted and b'"' in line) or (self.escape is not None and self.escape in line)

    @cached_property
    def bare(self) -> re.Pattern[bytes]:
        """A field without quotes."""
        escape = re.escape(self.escape or b"")
        others = b"[^" + re.escape(self.delimiter) + escape + b"]++"
        return re.compile(b"(?:" + others + (b"|" + escape + b"." if escape else b"") + b")*+", re.DOTALL)

    @cached_property
    def body(self) -> re.Pattern[bytes]:
        """A quoted field after its opening quote, up to the closing one."""
        escape = re.escape(self.escape or b"")
        others = b'(?:[^"' + escape + b']++|""' + (b"|" + escape + b"." if escape else b"") + b")*+"
        return re.compile(others, re.DOTALL)

    @cached_property
    def _escapes(self) -> re.Pattern[bytes]:
        return re.compile(re.escape(self.escape or b"") + b"(.)", re.DOTALL)

    def value(self, raw: bytes) -> bytes | None:
        """The value of a field without quotes."""
        if raw == NULL:
            return None
        if self.escape is None or self.escape not in raw:
            return raw
        return self._escapes.sub(lambda found: ESCAPED.get(found[1], found[1]), raw)

    def unquoted(self, raw: bytes) -> bytes | None:
        """The value of the inside of a quoted field."""
        if self.escape is None or self.escape not in raw:
            return None if raw == NULL else raw.replace(b'""', b'"')
        pairs = re.compile(b'""|' + self._escapes.pattern, re.DOTALL)
        value = pairs.sub(lambda found: b'"' if found[1] is None else ESCAPED.get(found[1], found[1]), raw)
        return None if raw == NULL else value


class BrokenQuoteError(ValueError):
    """A quoted field is not followed by a delimiter or the end of the row."""


class Record:
    """A row that is parsed line by line; `fields` are complete when `add` returns True."""

    def __init__(self, dialect: Dialect) -> None:
        self.fields: list[bytes | None] = []
        self._dialect = dialect
        self._text, self._at = b"", 0  # unread rest of the last field, and the last line; how far it is read
        self._open: list[bytes] | None = None  # pieces of a quoted field that is not closed yet

    def add(self, line: bytes) -> bool:
        """Add the next line, with the newline before it; returns whether the row is complete.

        :raises BrokenQuoteError: a quote is misplaced.
        """
        rest = self._text[self._at :]
        if not rest and not self._dialect.marks(line):
            return self._add_plain(line)
        self._text, self._at = rest + line, 0
        while True:
            end = self._quoted_field() if self._in_quotes() else self._bare_field()
            if end < 0:
                return False
            self._open = None
            if end == len(self._text):
                return True
            if self._dialect.quoted and self._text[end:] == b"\r":
                return True
            if self._text[end : end + 1] != self._dialect.delimiter:
                raise BrokenQuoteError(LOOSE_QUOTE)
            self._at = end + 1

    def _add_plain(self, line: bytes) -> bool:
        """Add a line without quotes and escapes: a part of the open field, or a whole row."""
        if self._open is not None:
            self._open.append(line)
            return False
        self.fields = [self._dialect.value(field) for field in self._without_cr(line).split(self._dialect.delimiter)]
        return True

    def _without_cr(self, end: bytes) -> bytes:
        """The end of a row without the `\\r` of `\\r\\n`; without quotes, the reader of lines has removed it."""
        return end.removesuffix(b"\r") if self._dialect.quoted else end

    def _in_quotes(self) -> bool:
        if self._open is None and self._dialect.quoted and self._text[self._at : self._at + 1] == b'"':
            self._open = []
            self._at += 1
        return self._open is not None

    def _quoted_field(self) -> int:
        """Where the open quoted field ends, after its closing quote; -1 where it goes on."""
        assert self._open is not None
        found = self._dialect.body.match(self._text, self._at)
        assert found is not None  # it may be empty
        self._open.append(found[0])
        self._at = found.end()
        if self._text[self._at : self._at + 1] != b'"':
            return -1
        self.fields.append(self._dialect.unquoted(b"".join(self._open)))
        return self._at + 1

    def _bare_field(self) -> int:
        found = self._dialect.bare.match(self._text, self._at)
        assert found is not None
        end = found.end()
        if self._dialect.escape is not None and self._text[end : end + 1] == self._dialect.escape:
            return -1  # it escapes the newline that follows
        raw = self._without_cr(found[0]) if end == len(self._text) else found[0]
        self.fields.append(self._dialect.value(raw))
        return end
