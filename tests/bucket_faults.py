"""Buckets that fail on purpose, as FaultyDisk does: the n-th request meets a fault."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from kittybuild.store.remote.bucket import WINDOW, Bucket, Piece, Unreachable
from tests.faults import Fault, Killed

PUTTING = ("put",)


class FaultyBucket:
    """A bucket whose n-th request (from 0) meets a fault. n < 0: none, only counting.

    EIO: it fails. ENOSPC: from then on nothing can be put. SHORT: half of an object is put, or there to be read.
    KILL, TORN: the process is dead, before a put or in the middle of one. EXIT: nobody answers any more.
    """

    def __init__(self, inner: Bucket, n: int = -1, fault: Fault = Fault.EIO) -> None:
        self.inner, self.n, self.fault, self.where = inner, n, fault, inner.where
        self.calls: list[str] = []
        self.dead = self.full = self.gone = False
        self._counting = threading.Lock()

    def _meet(self, name: str) -> bool:
        """Count a request; whether it is the one. Raises what an earlier fault has left."""
        if self.dead:
            raise Killed
        if self.gone or (self.full and name in PUTTING):
            raise Unreachable("no more")
        with self._counting:
            self.calls.append(name)
            met = len(self.calls) - 1 == self.n
        if met:
            self.dead = self.fault in (Fault.KILL, Fault.TORN)
            self.full, self.gone = self.fault is Fault.ENOSPC, self.fault is Fault.EXIT
        return met

    def _fail(self) -> None:
        if self.dead:
            raise Killed
        raise Unreachable("on purpose")

    def read(self, name: str, start: int = 0, length: int = WINDOW) -> Piece | None:
        """See Bucket."""
        met = self._meet("read")
        if met and self.fault is not Fault.SHORT:
            self._fail()
        piece = self.inner.read(name, start, length)
        if met and piece is not None:
            half = len(piece.data) // 2
            return Piece(piece.data[:half], half)
        return piece

    def put(self, name: str, data: memoryview) -> None:
        """See Bucket."""
        if self._meet("put"):
            if self.fault in (Fault.SHORT, Fault.TORN):
                self.inner.put(name, data[: len(data) // 2])
            self._fail()
        self.inner.put(name, data)

    def head(self, name: str) -> int | None:
        """See Bucket."""
        if self._meet("head"):
            self._fail()
        return self.inner.head(name)

    def list(self, folder: str) -> Iterator[tuple[str, int]]:
        """See Bucket."""
        if self._meet("list"):
            self._fail()
        return self.inner.list(folder)

    def delete(self, name: str) -> None:
        """See Bucket."""
        if self._meet("delete"):
            self._fail()
        self.inner.delete(name)
