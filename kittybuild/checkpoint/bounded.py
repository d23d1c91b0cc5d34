"""A file of which only so many bytes can be read: what it says of its own lengths cannot make us allocate more."""

from __future__ import annotations

import os
from typing import BinaryIO


class Bounded:
    """The open `file`, for one parser; more than `most` bytes in all are a ValueError that names `what`."""

    def __init__(self, file: BinaryIO, most: int, what: str) -> None:
        self._file, self._most, self._left, self._what = file, most, most, what

    def read(self, count: int = -1) -> bytes:
        """Up to `count` bytes; without a count all that follow."""
        if count < 0:
            count = max(0, os.fstat(self._file.fileno()).st_size - self._file.tell())
        self._spend(count)
        return self._file.read(count)

    def readline(self) -> bytes:
        """A line."""
        line = self._file.readline(self._left + 1)
        self._spend(len(line))
        return line

    def _spend(self, count: int) -> None:
        if count > self._left:
            raise ValueError(f"{self._what} goes on after {self._most} bytes")
        self._left -= count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place in the file."""
        return self._file.tell()
