"""One folder in the place of another, in one step where the system can; and what is left when a swap is cut short.

`X.kittybuild-new` is a folder in the making, or after the swap the old one. Where the system cannot swap, the old one
is `X.kittybuild-old` for a moment: if X is missing then, it goes back.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kittybuild.store.disk import Disk
from kittybuild.store.locks import try_lock
from kittybuild.store.problems import locked

_NEW = ".kittybuild-new"
_OLD = ".kittybuild-old"
_PATIENCE = 600.0
_PAUSE = 0.02


@contextmanager
def alone(folder: str, disk: Disk) -> Iterator[None]:
    """Be the only one to put something in the place of `folder`, whatever store it comes from.

    The lock is on the folder above, so that no lock file is left among the models.
    """
    parent = os.path.dirname(folder)
    disk.makedirs(parent)
    fd = os.open(parent, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _locked_or_cannot(fd):
            if time.monotonic() > deadline:
                raise locked(parent, _PATIENCE)
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(fd)


def _locked_or_cannot(fd: int) -> bool:
    try:
        return try_lock(fd, exclusive=True)
    except OSError:  # a network file system that locks no folders: then only builds of one store wait for each other
        return True


def tidy(folder: str, disk: Disk) -> str:
    """Undo or finish what was cut short; the answer is the path for the new folder, where nothing is."""
    new, aside = folder + _NEW, folder + _OLD
    if os.path.lexists(aside):
        if os.path.lexists(folder):
            disk.rmtree(aside)
        else:
            disk.rename(aside, folder)
        disk.sync_dir(os.path.dirname(folder))
    if os.path.lexists(new):
        disk.rmtree(new)
    return new


def place(new: str, folder: str, disk: Disk) -> None:
    """Put the folder `new` where `folder` is or is not; the old one is deleted."""
    parent = os.path.dirname(folder)
    if not os.path.isdir(folder):
        disk.rename(new, folder)
        disk.sync_dir(parent)
        return
    disk.chmod(new, stat.S_IMODE(os.stat(folder).st_mode))
    old = new
    try:
        disk.exchange(new, folder)
    except OSError:
        old = folder + _OLD
        disk.rename(folder, old)
        disk.rename(new, folder)
    disk.sync_dir(parent)
    disk.rmtree(old)
    disk.sync_dir(parent)
