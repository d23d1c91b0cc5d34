"""Leases: who makes a derivation just now, so that no two processes make the same at once.

A lease is a lock on one byte of a file, at a place that follows from what is made; the kernel frees it when its
holder dies. Leases save work and guard nothing: two that meet in one byte wait for each other once.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time

from kittybuild.digest import Digest
from kittybuild.store.disk import Disk
from kittybuild.store.layout import Layout
from kittybuild.store.problems import guarded

_PAUSE = 0.01
# Locks of an open file, as flock's are, and not of a process: so two stores in one process hold theirs apart.
_SET = getattr(fcntl, "F_OFD_SETLK", fcntl.F_SETLK)
_FORM = "hhqqi4x"  # struct flock of Linux: kind, whence, start, length, process


class Leases:
    """The leases of one open store. Thread-safe; a thread that holds one must not wait for another."""

    def __init__(self, disk: Disk, paths: Layout) -> None:
        self._disk, self._path = disk, paths.lock("leases")
        self._fd: int | None = None
        self._held: set[int] = set()
        self._state = threading.Lock()

    def take(self, what: Digest, patience: float = 0.0) -> bool:
        """Take it; False if another thread or process has it for longer than we wait."""
        place, deadline = int(what.hex[:15], 16), time.monotonic() + patience
        while not self._try(place):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE)
        return True

    def free(self, what: Digest) -> None:
        """Let go of it; twice is fine."""
        with guarded("unlock", self._path), self._state:
            place = int(what.hex[:15], 16)
            if place in self._held and self._fd is not None:
                self._lock(fcntl.F_UNLCK, place)
                self._held.discard(place)

    def close(self) -> None:
        """Let go of all."""
        with self._state:
            fd, self._fd = self._fd, None
            self._held.clear()
            if fd is not None:
                self._disk.close(fd)

    def _try(self, place: int) -> bool:
        with guarded("lock", self._path), self._state:
            if place in self._held:
                return False
            if self._fd is None:
                self._fd = self._disk.open_lock(self._path)
            try:
                self._lock(fcntl.F_WRLCK, place)
            except (BlockingIOError, PermissionError):
                return False
            self._held.add(place)
            return True

    def _lock(self, kind: int, place: int) -> None:
        assert self._fd is not None  # opened by the caller
        if hasattr(fcntl, "F_OFD_SETLK"):
            fcntl.fcntl(self._fd, _SET, struct.pack(_FORM, kind, os.SEEK_SET, place, 1, 0))
        else:
            flags = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(self._fd, flags, 1, place, os.SEEK_SET)
