"""Forms in which a blob travels: raw, as zstd, and as zstd with the bytes of its elements grouped.

Of neighbouring weights the first bytes (sign and exponent) are alike and the last are noise: apart, the former shrink.
A grouped blob is a zstd stream: a skippable frame that holds the size of an element, then chunks of the blob, each with
the first bytes of all its elements, then the second ones, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, cast

from kittybuild.store.remote.bucket import Unreachable

LEVEL = 3
CHUNK = 1 << 20
"""Bytes of a blob that are grouped at a time: a multiple of every element's size."""
OVERHEAD = 1024
_SIZES = (1, 2, 4, 8)
_MARK = b"\x50\x2a\x4d\x18\x01\0\0\0"  # zstd's own for a frame to be skipped, of one byte
_WINDOW = 1 << 23
"""More than our level ever asks for; a frame that wants more only wants our memory."""


def packed(data: memoryview, size: int) -> memoryview:
    """A blob of elements of `size` bytes, grouped and compressed."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj(size=len(data))
    parts = [_MARK + bytes([size])]
    for start in range(0, len(data), CHUNK):
        parts.append(compressor.compress(_grouped(data[start : start + CHUNK], size)))
    return memoryview(b"".join((*parts, compressor.flush())))


def unpacked(parts: Iterator[memoryview], nbytes: int, *, grouped: bool) -> Iterator[memoryview]:
    """The bytes behind a compressed blob, in bounded pieces; what would be more than `nbytes` is Unreachable."""
    import zstandard

    file = _File(parts)
    size = _element(file) if grouped else 1
    reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(cast("IO[bytes]", file))
    left = nbytes
    try:
        while piece := _filled(reader, min(CHUNK, left + 1)):
            left -= len(piece)
            if left < 0:
                raise Unreachable("a compressed blob holds more than it should")
            yield _apart(piece, size)
    except zstandard.ZstdError as error:
        raise Unreachable(f"a compressed blob is damaged: {error}") from error


def _element(file: _File) -> int:
    head = _filled(file, len(_MARK) + 1)
    if head[:-1] != _MARK or head[-1] not in _SIZES:
        raise Unreachable("a grouped blob does not begin as one")
    return head[-1]


def _grouped(data: memoryview, size: int) -> bytes:
    """The first bytes of all elements, then the second ones, and so on; then what is no whole element."""
    import numpy

    whole = len(data) // size * size
    return bytes(numpy.frombuffer(data[:whole], numpy.uint8).reshape(-1, size).T.tobytes() + data[whole:])


def _apart(data: bytes, size: int) -> memoryview:
    """The inverse of `_grouped`."""
    import numpy

    if size == 1:
        return memoryview(data)
    whole = len(data) // size * size
    return memoryview(numpy.frombuffer(data[:whole], numpy.uint8).reshape(size, -1).T.tobytes() + data[whole:])


def _filled(file: _File | IO[bytes], size: int) -> bytes:
    """So many bytes, fewer only at the end."""
    found = bytearray()
    while len(found) < size and (piece := file.read(size - len(found))):
        found += piece
    return bytes(found)


class _File:
    """Parts as a file to read from."""

    def __init__(self, parts: Iterator[memoryview]) -> None:
        self._parts, self._rest = parts, memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        if not self._rest:
            self._rest = next(self._parts, memoryview(b""))
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)
