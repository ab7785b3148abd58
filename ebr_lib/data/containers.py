"""What a file holds, by its first bytes: text, compressed text, Parquet, ORC, or a container that is refused.

Names say little: Hive calls its parts `000000_0` whatever they hold, and a wrong guess would encode garbage as rows.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from ebr_lib.errors import DataError, MissingError

if TYPE_CHECKING:
    import pyarrow as pa

TEXT, GZIP, BZ2, ZSTD, PARQUET, ORC = "text", "gzip", "bz2", "zstd", "parquet", "orc"
COLUMNAR = (PARQUET, ORC)
HEAD_BYTES = 4096
BUFFER_BYTES = 1 << 20
PARQUET_HEAD = b"PAR1\x15"  # the mark, and how the first page header begins; a column of text may be named PAR1
TEXT_BYTES = bytes([1, 2, 3, 9, 10, 13, *range(32, 127)])  # of text in ASCII, Hive's delimiters among them
SNAPPY_RATIO = 22  # a copy of 64 bytes takes three

HADOOP = "unpack it with `hadoop fs -text FILE > FILE.txt`, or export with hive.exec.compress.output=false"
SPARK = "convert it to Parquet or text with Hive or Spark"
REFUSED = (  # offset, first bytes, name, remedy
    (0, b"\xff\x06\x00\x00sNaPpY", "framed snappy", HADOOP),
    (0, b"\x04\x22\x4d\x18", "an lz4 frame", "unpack it with `lz4 -d`"),
    (0, b"\x02\x21\x4c\x18", "a legacy lz4 frame", "unpack it with `lz4 -d`"),
    (0, b"\x89LZO\x00\x0d\x0a\x1a\x0a", "LZO (lzop)", "unpack it with `lzop -d`"),
    (0, b"\xfd7zXZ\x00", "xz", "unpack it with `xz -d`"),
    (0, b"PK\x03\x04", "a zip archive (or an Excel workbook)", "unpack it, or save it as CSV"),
    (0, b"PK\x05\x06", "an empty zip archive", "unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (0, b"Rar!\x1a\x07", "a rar archive", "unpack it"),
    (0, b"\x1f\x9d", "compress (.Z)", "unpack it with `uncompress`"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook", "save it as CSV"),
    (0, b"Obj\x01", "Avro", SPARK),
    (0, b"RCF\x01", "an RCFile", SPARK),
    (0, b"ARROW1\x00\x00", "an Arrow or Feather file", "write it as Parquet"),
    (0, b"\x93NUMPY", "a numpy array", "give the table of texts"),
    (0, b"SQLite format 3\x00", "an SQLite database", "export the table as text"),
    (0, b"%PDF-", "a PDF", "give the table of texts"),
    (0, b"PARE", "encrypted Parquet", "decrypt it"),
    *((0, b"SEQ" + bytes([version]), "a Hadoop SequenceFile", HADOOP) for version in range(1, 8)),
)


def kind_of(path: Path) -> str:
    """What a file holds: text, gzip, bz2, zstd, parquet or orc.

    :raises DataError: it is another container; says which, and how to unpack it.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        kind = _kind(head, path, size)
        if kind == TEXT and head.startswith(b"ORC"):
            file.seek(max(0, size - 4))
            kind = ORC if b"\x00" in head or file.read(3) == b"ORC" else TEXT
    if kind == TEXT and path.suffix.lower() == ".parquet" and (b"\x00" in head or not head):
        return PARQUET  # cut or overwritten: the reader raises
    _refuse(path, head, size)
    if kind in (GZIP, BZ2, ZSTD):
        _refuse_inner(path, kind)
    return kind


def _kind(head: bytes, path: Path, size: int) -> str:
    if head.startswith(PARQUET_HEAD) or (head.startswith(b"PAR1") and path.suffix.lower() == ".parquet"):
        return PARQUET
    if head.startswith(b"\x1f\x8b"):
        return GZIP
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return BZ2
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        return ZSTD
    return TEXT


def _refuse(path: Path, head: bytes, size: int, inside: str = "") -> None:
    for offset, mark, name, remedy in REFUSED:
        if head.startswith(mark, offset):
            raise _refusal(path, name, remedy, inside)
    if name := _hadoop_codec(head, size):
        raise _refusal(path, name, HADOOP, inside)


def _refusal(path: Path, name: str, remedy: str, inside: str = "") -> DataError:
    held = f"{inside} that holds {name}" if inside else name
    return DataError(f"{path} is {held}, which is not read; {remedy}")


def _refuse_inner(path: Path, kind: str) -> None:
    """Check that compressed data holds text, and not another container."""
    with open_bytes(path, kind) as file:
        head = file.read(HEAD_BYTES)
    if (inner := _kind(head, path, len(head))) != TEXT:
        raise _refusal(path, inner, "unpack it once", kind)
    ended = len(head) < HEAD_BYTES
    _refuse(path, head, len(head) if ended else len(head) + 1, kind)


def _hadoop_codec(head: bytes, size: int) -> str:
    """The codec of Hadoop's that has no mark of its own, if it is one; else empty."""
    if _is_snappy(head, size):
        return "raw snappy"
    if _is_zlib(head):
        return "deflate (zlib)"
    whole, packed = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big")
    if len(head) > 8 and not head[0] and not head[4] and whole and 0 < packed <= size - 8:
        return _block_codec(head[8:][:packed], packed, whole)
    return ""


def _block_codec(block: bytes, packed: int, whole: int) -> str:
    """The codec in Hadoop's block format: sizes before each block, and no mark."""
    if _is_snappy(block, packed):
        return "snappy in Hadoop's blocks"
    import pyarrow as pa

    if len(block) == packed:
        try:
            pa.decompress(block, whole, "lz4_raw")
            return "lz4 in Hadoop's blocks"
        except (OSError, pa.ArrowException):
            pass
    return "LZO or lz4 in Hadoop's blocks"


def _is_zlib(head: bytes) -> bool:
    if head[:1] != b"\x78" or int.from_bytes(head[:2], "big") % 31 or len(head) < 8:
        return False
    try:
        return bool(zlib.decompressobj().decompress(head))
    except zlib.error:
        return False


def _is_snappy(head: bytes, size: int) -> bool:
    """Whether bytes are raw snappy, which has no mark: its elements must be possible, and fill what they announce."""
    announced, at = _varint(head)
    if head.isascii() and not head.translate(None, TEXT_BYTES):
        return False
    if not announced or not (size <= 32 + announced + announced // 6 and announced <= SNAPPY_RATIO * size):
        return False
    made, whole = 0, len(head) == size
    while at < (len(head) if whole else len(head) - 5) and made < announced:  # the last element may be cut
        length, offset, at = _snappy_element(head, at)
        if length < 0 or offset > made:
            return False
        made += length
    return (made == announced and at == size) if whole else 0 < made <= announced


def _varint(head: bytes) -> tuple[int, int]:
    value = 0
    for at, byte in enumerate(head[:5]):
        value |= (byte & 0x7F) << (7 * at)
        if byte < 0x80:
            return value, at + 1
    return 0, 0


def _snappy_element(head: bytes, at: int) -> tuple[int, int, int]:
    """Bytes that an element makes (negative for an impossible one), how far back it copies from, where it ends."""
    tag = head[at]
    kind = tag & 3
    if kind == 0:
        extra = max(0, (tag >> 2) - 59)
        length = (int.from_bytes(head[at + 1 : at + 1 + extra], "little") if extra else tag >> 2) + 1
        return length, 0, at + 1 + extra + length
    if kind == 1:
        offset = (tag >> 5) << 8 | int.from_bytes(head[at + 1 : at + 2], "little")
        return (4 + (tag >> 2 & 7) if offset else -1), offset, at + 2
    width = 2 if kind == 2 else 4
    offset = int.from_bytes(head[at + 1 : at + 1 + width], "little")
    return ((tag >> 2) + 1 if offset else -1), offset, at + 1 + width


# --- opening ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def readable(path: Path, kind: str = TEXT) -> Iterator[None]:
    """Turn what goes wrong while a file is read into an error that names it.

    :raises MissingError: it is no longer there.
    :raises DataError: its data is damaged, is written in a way that is not read here, or cannot be read.
    """
    import pyarrow as pa

    name = {ORC: "ORC"}.get(kind, "Parquet")
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"{path}: the file is no longer there; put it back and run the same call again") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip data is damaged or cut short ({error}); fetch the file again") from error
    except pa.ArrowNotImplementedError as error:
        raise DataError(f"{path}: {name} that is not read here ({error}); write it with other settings") from error
    except OSError as error:
        if error.errno is not None:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); fix that and run the same call again"
            ) from error
        what = f"is not a complete {name} file" if kind in COLUMNAR else "is damaged or not complete"
        raise DataError(f"{path} {what} ({error}); fetch it again") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:  # of the second kind for a damaged name of a column
        if isinstance(error, UnicodeDecodeError) and kind not in COLUMNAR:
            raise
        raise DataError(f"{path} is not a complete {name} file ({error}); fetch it again") from error


def opened(path: Path) -> IO[bytes]:
    """Open a file of text for its bytes, unpacked where it is compressed.

    :raises DataError: it is a container that is refused, or Parquet or ORC.
    """
    if (kind := kind_of(path)) in COLUMNAR:
        raise DataError(f"{path} is {kind}, where text is wanted; convert it to text")
    return open_bytes(path, kind)


def open_bytes(path: Path, kind: str) -> IO[bytes]:
    """Open a file as unpacked text; seeking back in a compressed one reads it from the start again."""
    file = open(path, "rb")  # noqa: SIM115 - the callers close it
    if kind == GZIP:
        return cast("IO[bytes]", io.BufferedReader(gzip.GzipFile(fileobj=file), BUFFER_BYTES))
    if kind in (BZ2, ZSTD):
        file.close()
        return cast("IO[bytes]", io.BufferedReader(_Unpacked(path, kind), BUFFER_BYTES))
    return file


def unpacked_size(path: Path, kind: str) -> int:
    """Bytes of a file's text: exact for text, and for gzip of one member below 4 GiB; else an estimate."""
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        if kind == GZIP:
            file.seek(-4, io.SEEK_END)
            return int.from_bytes(file.read(4), "little")
    return size if kind == TEXT else 4 * size


class _Unpacked(io.RawIOBase):
    """bz2 or zstd, of one or more streams, read through Arrow; damage is an error, also at the end."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind
        self._stream = self._opened()
        self._at = 0

    def _opened(self) -> pa.NativeFile:
        import pyarrow as pa

        return pa.input_stream(str(self._path), compression=self._kind)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        import pyarrow as pa

        try:
            data = self._stream.read(len(buffer))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self._path}: the {self._kind} data is damaged or cut short ({error}); fetch the file again"
            ) from error
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only from the start")
        if offset < self._at:
            self._stream.close()
            self._stream, self._at = self._opened(), 0
        while self._at < offset and self.readinto(bytearray(min(BUFFER_BYTES, offset - self._at))):
            pass
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
