"""A bucket: named bytes on some server. The smallest thing that any of them can be.

Absent is None, broken is Unreachable, putting or deleting twice is harmless. Nothing read from one is believed here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

WINDOW = 8 << 20
"""Bytes that one request asks for at most: each is retried by itself, and bounds what is in flight."""


class Unreachable(Exception):
    """A request that failed; the text says why. Never leaves the package `remote` but as a RemoteError or a note."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of an object, and the size of the whole as the server tells it."""

    data: memoryview
    total: int


@dataclass(frozen=True, slots=True)
class Listed:
    """What a server tells of an object: name, size, and when it was put, in seconds since the epoch."""

    name: str
    size: int
    put: float


class Bucket(Protocol):
    """Bytes by name. Any thread may use it."""

    @property
    def where(self) -> str:
        """Its address, for messages."""

    def read(self, name: str, start: int = 0, length: int = WINDOW) -> Piece | None:
        """At most `length` bytes from `start` on, fewer only at the end. None: there is no such object."""

    def put(self, name: str, data: memoryview) -> None:
        """Make or replace an object, whole or not at all."""

    def head(self, name: str) -> Listed | None:
        """What is told of one object. None: there is no such object."""

    def list(self, folder: str) -> Iterator[Listed]:
        """All objects whose names begin with `folder` and a slash."""

    def delete(self, name: str) -> None:
        """Remove an object; absent is fine."""


@dataclass(frozen=True)
class Retried:
    """A bucket that tries again: longer pauses each time, by chance up to twice as long. `pause`: seconds."""

    inner: Bucket
    tries: int = 4
    pause: float = 0.2

    @property
    def where(self) -> str:
        """See Bucket."""
        return self.inner.where

    def read(self, name: str, start: int = 0, length: int = WINDOW) -> Piece | None:
        """See Bucket."""
        return self._again(lambda: self.inner.read(name, start, length))

    def put(self, name: str, data: memoryview) -> None:
        """See Bucket."""
        self._again(lambda: self.inner.put(name, data))

    def head(self, name: str) -> Listed | None:
        """See Bucket."""
        return self._again(lambda: self.inner.head(name))

    def list(self, folder: str) -> Iterator[Listed]:
        """See Bucket."""
        return iter(self._again(lambda: tuple(self.inner.list(folder))))

    def delete(self, name: str) -> None:
        """See Bucket."""
        self._again(lambda: self.inner.delete(name))

    def _again(self, request: Callable[[], T]) -> T:
        for number in range(self.tries - 1):
            try:
                return request()
            except Unreachable:
                time.sleep(self.pause * 2**number * (1 + os.urandom(1)[0] / 255))
        return request()


def stream(bucket: Bucket, name: str, most: int) -> Iterator[memoryview] | None:
    """The bytes of an object, a window at a time, or None. Raises Unreachable, also where there are more than `most`
    bytes or the size changes."""
    first = bucket.read(name, 0, min(WINDOW, max(1, most)))
    if first is None:
        return None
    if first.total > most:
        raise Unreachable(f"{name} has {first.total} bytes, more than the {most} that it may have")
    return _rest(bucket, name, first)


def _rest(bucket: Bucket, name: str, piece: Piece) -> Iterator[memoryview]:
    total, done = piece.total, 0
    while True:
        done += len(piece.data)
        yield piece.data
        if done >= total:
            return
        following = bucket.read(name, done, min(WINDOW, total - done))
        if following is None or following.total != total or not following.data:
            raise Unreachable(f"{name} changed while it was read")
        piece = following


def whole(bucket: Bucket, name: str, most: int) -> bytes | None:
    """All bytes of an object, or None. Raises Unreachable, also where there are more than `most`."""
    parts = stream(bucket, name, most)
    return None if parts is None else b"".join(parts)
