"""Roots of a cache: what a push keeps, by its name and its signer. What no root keeps, collection may delete.

They are written before anything that they name, so that whoever collects knows what is about to be needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kittybuild.digest import Digest, Json, canonical
from kittybuild.errors import RemoteError
from kittybuild.store.remote import names
from kittybuild.store.remote.bucket import Bucket, Listed, whole

LARGEST_ROOT = 64 << 20
STREAMS = 8


@dataclass(frozen=True)
class Root:
    """What `signer` keeps under a name: blobs, and of each kind of claim those about these keys or files."""

    name: str
    signer: str
    blobs: frozenset[Digest]
    claims: Mapping[str, frozenset[str]]

    @property
    def place(self) -> str:
        """The name of its object."""
        return names.root(self.name, self.signer)

    def objects(self) -> Iterable[str]:
        """The names of all objects that it keeps, itself included."""
        yield self.place
        for digest in self.blobs:
            yield from names.blobs(digest)
        for kind, abouts in self.claims.items():
            for about in abouts:
                yield names.claim(kind, about, self.signer)

    def to_bytes(self) -> bytes:
        """Its object."""
        claims: dict[str, Json] = {kind: sorted(self.claims.get(kind, ())) for kind in names.KINDS}
        form: dict[str, Json] = {"kittybuild.root": 1, "name": self.name, "signer": self.signer}
        return canonical({**form, "blobs": sorted(digest.hex for digest in self.blobs), **claims})

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> Root:
        """The inverse of `to_bytes`; raises ValueError for anything else, or where it lies in another place."""
        try:
            form = json.loads(data)
            blobs = frozenset(map(Digest, form["blobs"]))
            claims = {kind: frozenset(Digest(about).hex for about in form[kind]) for kind in names.KINDS}
            root = cls(form["name"], form["signer"], blobs, claims)
            if form["kittybuild.root"] == 1 and isinstance(root.name, str) and root.place == place:
                return root
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a root: {error!r}") from error
        raise ValueError("a root of another place or format")


def put_root(bucket: Bucket, root: Root) -> None:
    """Keep what it names, instead of what its signer kept under that name before. Raises Unreachable."""
    bucket.put(root.place, memoryview(root.to_bytes()))


def all_roots(bucket: Bucket) -> tuple[tuple[Root, Listed], ...]:
    """Every root, with what is told of its object.

    Raises Unreachable, and RemoteError KB809 for one that cannot be read: what it keeps is not known.
    """
    listed = sorted(bucket.list(names.ROOTS), key=lambda one: one.name)
    with ThreadPoolExecutor(STREAMS) as threads:
        found = list(threads.map(lambda one: _read(bucket, one.name), listed))
    return tuple((root, one) for root, one in zip(found, listed, strict=True) if root is not None)


def former(bucket: Bucket, root: Root) -> frozenset[Digest]:
    """The blobs that the root in its place keeps now; none where there is none that can be read. Raises Unreachable."""
    try:
        found = _read(bucket, root.place)
    except RemoteError:
        return frozenset()
    return found.blobs if found else frozenset()


def _read(bucket: Bucket, place: str) -> Root | None:
    """None: it was dropped just now."""
    try:
        data = whole(bucket, place, LARGEST_ROOT)
        return None if data is None else Root.from_bytes(data, place)
    except ValueError as error:
        hint = f"delete {place} there, and push again what it was for"
        raise RemoteError("KB809", f"a root cannot be read: {error}", at=bucket.where, hint=hint) from error
