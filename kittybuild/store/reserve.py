"""The reserve: space that the store gives back before it is tidied up, so that a full disk can be cleaned."""

from __future__ import annotations

import os

from kittybuild.store.disk import Disk
from kittybuild.store.layout import TEMPORARY, Layout
from kittybuild.store.problems import NO_ROOM, guarded

SIZE = 8 << 20


def make_reserve(disk: Disk, paths: Layout, size: int = SIZE) -> bool:
    """Set the space aside if there is room for it; the answer is whether it is there.

    It gets its name when it is whole: a part of one would look like damage.
    """
    left = reserved(paths)
    if left == size:
        return True
    beside = os.path.join(paths.root, f".{os.urandom(16).hex()}{TEMPORARY}")
    try:
        if left is not None:
            disk.unlink(paths.reserve)
        disk.close(disk.create(beside, size))
        disk.rename(beside, paths.reserve)
    except OSError as error:
        disk.unlink(beside)
        if error.errno not in NO_ROOM:
            raise
        return False
    return True


def reserved(paths: Layout) -> int | None:
    """How many bytes are set aside; None if they were given back."""
    try:
        return os.stat(paths.reserve).st_size
    except FileNotFoundError:
        return None


def free_reserve(disk: Disk, paths: Layout) -> None:
    """Give the space back; absent is fine."""
    with guarded("delete", paths.reserve):
        disk.unlink(paths.reserve)
