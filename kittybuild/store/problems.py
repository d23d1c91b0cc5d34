"""How the store says that something went wrong: one place for its codes and texts.

KB701 cannot be opened · KB702 another format · KB703 not deterministic · KB704 disk full
KB705 operation failed · KB706 damaged file · KB707 locked · KB708 index failed · KB710 damaged tensor
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from kittybuild.digest import Digest
from kittybuild.errors import StoreError
from kittybuild.tensors import TensorRef

FULL = "KB704"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class DamagedTensor(StoreError):
    """A stored tensor has other bytes than its digest says; `path` is the file to discard."""

    def __init__(self, path: str, what: str) -> None:
        self.path = path
        super().__init__("KB710", f"damaged: {what}", at=path, hint="the file is set aside and its tensors made again")


def failure(error: OSError, operation: str, path: str, wanted: int = 0) -> StoreError:
    """The error for a file operation that failed; `wanted` is how many bytes it needed."""
    if error.errno in NO_ROOM:
        return full(path, wanted)
    return StoreError(
        "KB705",
        f"cannot {operation}: {error.strerror or error}",
        at=path,
        hint="see that the disk is healthy and the folder yours to write, then run again: what was finished is kept",
    )


def full(path: str, wanted: int = 0) -> StoreError:
    """The error for a disk (or quota) without room."""
    amount = f": {wanted:,} bytes were wanted" if wanted else ""
    return StoreError(
        FULL,
        f"the disk is full{amount}",
        at=path,
        hint="free some space, or name another store with --store; finished tensors are kept",
    )


@contextmanager
def guarded(operation: str, path: str, wanted: int = 0) -> Iterator[None]:
    """Turn an OSError into a StoreError that names the operation and the path."""
    try:
        yield
    except OSError as error:
        raise failure(error, operation, path, wanted) from error


def cannot_open(root: str, error: OSError) -> StoreError:
    """The store's folder cannot be made or written."""
    return StoreError(
        "KB701",
        f"cannot open the store for writing: {error.strerror or error}",
        at=root,
        hint="name a folder that you may write, with --store or KITTYBUILD_STORE",
    )


def other_format(root: str, found: str, known: str) -> StoreError:
    """The folder has a FORMAT that is not ours."""
    return StoreError(
        "KB702",
        f"this store is of format {found!r}, and this kittybuild knows {known!r}",
        at=root,
        hint="use the kittybuild that made it, or another folder with --store",
    )


def not_deterministic(root: str, key: Digest, first: TensorRef, second: TensorRef) -> StoreError:
    """One derivation made two different tensors."""
    return StoreError(
        "KB703",
        f"not deterministic: derivation {key} made {_named(second)}, but earlier {_named(first)}",
        at=root,
        hint="the first is kept; build again in an empty store (--store) to see which of the two comes back",
    )


def damaged(path: str, what: str, hint: str) -> StoreError:
    """A file of the store is not what it must be."""
    return StoreError("KB706", f"damaged: {what}", at=path, hint=hint)


def locked(path: str, seconds: float) -> StoreError:
    """Another process kept a lock for too long."""
    return StoreError(
        "KB707",
        f"locked by another process for more than {seconds:.0f} seconds",
        at=path,
        hint="wait for the other kittybuild to end, then run again",
    )


def index_failed(path: str, error: Exception, *, moved: bool = False) -> StoreError:
    """The index database cannot be used."""
    again = "run again: it is made anew from packs and manifests"
    return StoreError(
        "KB708",
        f"the index {'is damaged and was moved aside' if moved else 'cannot be used'}: {error or type(error).__name__}",
        at=path,
        hint=again if moved else f"delete this folder and {again}",
    )


def _named(ref: TensorRef) -> str:
    return f"{ref.spec} {ref.digest}"
