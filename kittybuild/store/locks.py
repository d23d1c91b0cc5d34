"""Locks between processes: `flock` on files that are never deleted. The kernel frees them when their holder dies."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kittybuild.store.disk import Disk
from kittybuild.store.problems import guarded, locked

_PAUSE = 0.02


def try_lock(fd: int, *, exclusive: bool) -> bool:
    """Take the lock on an open file if nobody holds it against us."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take(disk: Disk, path: str, *, exclusive: bool, patience: float) -> int:
    """Open a lock file and take its lock; raises StoreError after `patience` seconds. Closing the file frees it."""
    with guarded("lock", path):
        fd = disk.open_lock(path)
        try:
            convert(path, fd, exclusive=exclusive, patience=patience)
        except BaseException:
            disk.close(fd)
            raise
    return fd


def convert(path: str, fd: int, *, exclusive: bool, patience: float) -> None:
    """Take the lock on an open file, instead of the other kind, which is lost meanwhile; raises as `take` does."""
    deadline = time.monotonic() + patience
    while not try_lock(fd, exclusive=exclusive):
        # Asking again, rather than waiting in the kernel, so that a holder that hangs ends in an error.
        if time.monotonic() > deadline:
            raise locked(path, patience)
        time.sleep(_PAUSE)


def release(disk: Disk, path: str, fd: int) -> None:
    """Free a lock that was taken."""
    with guarded("unlock", path):
        disk.close(fd)


@contextmanager
def held(disk: Disk, path: str, *, exclusive: bool, patience: float) -> Iterator[None]:
    """Hold a lock for the length of a block."""
    fd = take(disk, path, exclusive=exclusive, patience=patience)
    try:
        yield
    finally:
        release(disk, path, fd)
