"""Garbage collection in a cache: first a plan, which is a value, then the deletion of just what it lists.

What a root keeps stays, and what was put lately stays too: it may belong to a push that is not done. A bucket has no
locks, so that time is all that protects a push; who pushes puts its root first, and sends again what is old and no
root's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from kittybuild.errors import RemoteError
from kittybuild.store.remote import names
from kittybuild.store.remote.bucket import Bucket, Listed, Unreachable
from kittybuild.store.remote.roots import STREAMS, Root, all_roots

DAY = 86_400.0


@dataclass(frozen=True)
class RemotePlan:
    """What no root keeps and was put long ago. `rooted`, `young`: bytes that stay for roots, and for being new."""

    delete: tuple[Listed, ...]
    roots: int
    rooted: int
    young: int

    @property
    def freed(self) -> int:
        """Bytes that the server has more afterwards."""
        return sum(one.size for one in self.delete)


def plan_gc(bucket: Bucket, older_than: float) -> RemotePlan:
    """What was put more than `older_than` seconds ago and no root keeps. Raises RemoteError KB802 or KB809."""
    with _reached(bucket):
        # First the objects, then the roots: a root that comes in between keeps what it names.
        listed = [one for kind in (*names.KINDS, names.CAS) for one in bucket.list(kind) if names.is_ours(one.name)]
        now = time.time()
        roots = all_roots(bucket)
        kept = _kept(roots)
    rest = [one for one in listed if one.name not in kept]
    old = tuple(one for one in rest if one.put < now - older_than)
    size, young = sum(one.size for one in listed), sum(one.size for one in rest if one not in set(old))
    return RemotePlan(old, len(roots), size - young - sum(one.size for one in old), young)


def collect(bucket: Bucket, plan: RemotePlan) -> tuple[Listed, ...]:
    """Delete what the plan lists, but for what got a root since or was put again; what was deleted. Claims go before
    blobs, so that none leads nowhere. Raises RemoteError KB802 or KB809."""
    with _reached(bucket):
        kept = _kept(all_roots(bucket))

        def delete(one: Listed) -> bool:
            told = bucket.head(one.name)
            if one.name in kept or told is None or told.put > one.put + 1:  # some servers tell whole seconds here only
                return False
            bucket.delete(one.name)
            return True

        gone: list[Listed] = []
        for blobs in (False, True):
            some = [one for one in plan.delete if one.name.startswith(f"{names.CAS}/") is blobs]
            with ThreadPoolExecutor(STREAMS) as threads:
                gone += [one for one, done in zip(some, threads.map(delete, some), strict=True) if done]
    return tuple(gone)


def drop(bucket: Bucket, name: str, signer: str | None = None) -> tuple[Root, ...]:
    """Drop the roots of a name, of one signer or all, and return them. Raises RemoteError KB802 or KB809."""
    with _reached(bucket):
        found = tuple(root for root, _ in all_roots(bucket) if root.name == name and signer in (None, root.signer))
        for root in found:
            bucket.delete(root.place)
    return found


def listed_roots(bucket: Bucket) -> tuple[tuple[Root, Listed], ...]:
    """Every root, with what is told of its object. Raises RemoteError KB802 or KB809."""
    with _reached(bucket):
        return all_roots(bucket)


def _kept(roots: tuple[tuple[Root, Listed], ...]) -> set[str]:
    return {name for root, _ in roots for name in root.objects()}


@contextmanager
def _reached(bucket: Bucket) -> Iterator[None]:
    try:
        yield
    except Unreachable as error:
        hint = "check address, rights and connection; what cannot list (plain HTTP) is cleaned by its own rules"
        raise RemoteError("KB802", f"cannot collect in this cache: {error}", at=bucket.where, hint=hint) from error
