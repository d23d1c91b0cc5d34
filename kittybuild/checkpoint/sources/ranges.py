"""A file of which some ranges are here: as large as the whole, with holes, and a list of what is in it beside it.

A range is on the list only after its bytes are on the disk, so that a download cut short anywhere is gone on with.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Range = tuple[int, int]

FLUSH_EVERY = 64 << 20


def joined(ranges: Iterable[Range], gap: int = 0) -> tuple[Range, ...]:
    """The same bytes in as few ranges as possible, in order; holes of up to `gap` bytes are filled."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if found and start <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return tuple(found)


def without(ranges: Iterable[Range], taken: Iterable[Range]) -> tuple[Range, ...]:
    """What of `ranges` is not in `taken`."""
    left, taken = [], joined(taken)
    for start, stop in joined(ranges):
        for begin, end in taken:
            if begin < stop and start < end:
                left.append((start, begin))
                start = end
        left.append((start, stop))
    return tuple((start, stop) for start, stop in left if start < stop)


def size_of(ranges: Iterable[Range]) -> int:
    """The number of bytes in ranges that do not overlap."""
    return sum(stop - start for start, stop in ranges)


class Ranges:
    """The file at `path`, of `size` bytes when it is whole. One process writes it at a time."""

    def __init__(self, path: str, size: int) -> None:
        self.path, self.size = path, size
        self._list = f"{path}.json"

    def here(self) -> tuple[Range, ...]:
        """What is in it; nothing, if the list or the file is lost or damaged."""
        try:
            with open(self._list, encoding="utf-8") as text:
                found = [(int(start), int(stop)) for start, stop in json.load(text)]
            if os.stat(self.path).st_size == self.size and all(0 <= a < b <= self.size for a, b in found):
                return joined(found)
        except (OSError, ValueError, TypeError):
            pass
        return ()

    @contextmanager
    def writing(self) -> Iterator[_Writer]:
        """Be the only one to write into it; what was written is listed on the way and at the end."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        lock = os.open(f"{self.path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = self.here()
            if not done:
                self.remove()  # a list without its file, or the other way round, is about other bytes
            file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(file, self.size)
                writer = _Writer(file, self._list, list(done))
                try:
                    yield writer
                finally:
                    writer.flush()
            finally:
                os.close(file)
        finally:
            os.close(lock)

    def remove(self) -> None:
        """Delete file and list; the lock stays for those who wait for it."""
        for path in (self._list, self.path):
            if os.path.lexists(path):
                os.unlink(path)


class _Writer:
    """Takes bytes for an open file. `done` is what is in it so far."""

    def __init__(self, file: int, listed: str, done: list[Range]) -> None:
        self._file, self._listed, self.done, self._unlisted = file, listed, done, 0

    def write(self, offset: int, data: bytes) -> None:
        """Bytes from `offset` on."""
        rest, at = memoryview(data), offset
        while rest:
            count = os.pwrite(self._file, rest, at)
            rest, at = rest[count:], at + count
        self.done = list(joined([*self.done, (offset, at)]))
        self._unlisted += len(data)
        if self._unlisted >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Have the bytes on the disk, then the list."""
        if not self._unlisted:
            return
        os.fsync(self._file)
        temporary = f"{self._listed}.tmp"
        with open(temporary, "w", encoding="utf-8") as text:
            json.dump(self.done, text)
            text.flush()
            os.fsync(text.fileno())
        os.replace(temporary, self._listed)
        self._unlisted = 0
