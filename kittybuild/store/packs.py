"""The complete packs: which there are, and which tensors lie where in them.

The index has the size and the time of each pack when it was last known to be good: [size, mtime], the time null if its
tensors were not read since it was found.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping

from kittybuild.digest import Digest, Json
from kittybuild.errors import StoreError
from kittybuild.store.facts import Facts, Location
from kittybuild.store.index import Index
from kittybuild.store.journal import Finished
from kittybuild.store.layout import Layout, stored_digests
from kittybuild.store.pack import PackLayout, read_pack_header
from kittybuild.store.problems import damaged
from kittybuild.store.reading import digests
from kittybuild.tensors import TensorRef

_PACK = "pack"
_USED = "used"
_SUFFIX = ".safetensors"
_MINUTE = 60


class Packs:
    """The packs of a store, with their rows in the index, and a location for each tensor."""

    def __init__(self, layout: Layout, index: Index, facts: Facts) -> None:
        self._layout = layout
        self._index = index
        self._facts = facts

    def path(self, digest: Digest) -> str | None:
        """The path of a pack that is there and unchanged; its tensors are read only if it seems to have changed.

        A shard of an output folder is the pack under another name: who edits it there changes the pack.
        """
        path = self._layout.pack(digest)
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            return None
        self._facts.touched.add(path)
        known = self._index.get(_PACK, digest.hex)
        if known == [stat.st_size, stat.st_mtime_ns]:
            return path
        if known is None and not self.adopt(digest, path):
            return None
        return path if self._verify(digest, path) else None

    def adopt(self, digest: Digest, path: str) -> bool:
        """Record a pack that the index does not know; False if it is not what its name says. Tensors are not read."""
        try:
            layout, refs = named_pack(path, digest)
        except (StoreError, FileNotFoundError):
            return False
        known = self._facts.locations(ref.digest for ref in refs.values())
        entries = [entry for entry in _entries(refs) if entry.ref.digest not in known]
        self._facts.set_locations({entry.ref.digest: place(path, layout, entry) for entry in entries})
        self._index.put_many(_PACK, {digest.hex: [layout.size, None]})
        return True

    def record(self, digest: Digest, layout: PackLayout, entries: Iterable[Finished]) -> None:
        """Record a complete pack that is what it should be, and that it is where these of its tensors lie."""
        path = self._layout.pack(digest)
        self._facts.set_locations({entry.ref.digest: place(path, layout, entry) for entry in entries})
        self._index.put_many(_PACK, {digest.hex: [layout.size, os.stat(path).st_mtime_ns]})

    def _verify(self, digest: Digest, path: str) -> bool:
        """Read all tensors; a pack that holds what it should is recorded as it is now."""
        try:
            layout, refs = named_pack(path, digest)
            with open(path, "rb") as file:
                before = os.fstat(file.fileno()).st_mtime_ns
                found = [digests(file.fileno(), layout.offset(name), ref.spec.nbytes) for name, ref in refs.items()]
        except (StoreError, OSError):
            return False
        if [strong for strong, _ in found] != [ref.digest for ref in refs.values()]:
            return False
        self._index.put_many(_PACK, {digest.hex: [layout.size, before]})
        return True

    def note_used(self) -> None:
        """Record that what was asked for since the store was opened has been used, to the minute."""
        names = {os.path.basename(path).partition(".")[0]: path for path in self._facts.touched}
        keys = [digest.hex for digest, path in stored_digests(self._layout.packs, _SUFFIX) if digest.hex in names]
        known, now = self._index.get_many(_USED, keys), int(time.time())
        self._index.put_many(_USED, {key: now for key in keys if not _within(known.get(key), now)})
        self._facts.touched.clear()

    def used(self, digest: Digest, path: str) -> float:
        """When a pack was last used, in seconds since the epoch; when it was written, if nobody knows better."""
        known = self._index.get(_USED, digest.hex)
        return max(os.stat(path).st_mtime, float(known) if isinstance(known, int) else 0.0)

    def sync(self) -> None:
        """Return when what is recorded is on the disk."""
        self._index.sync()

    def unknown(self) -> list[tuple[Digest, str]]:
        """The packs on disk that the index does not know."""
        known = {key for key, _ in self._index.iterate(_PACK)}
        return [pack for pack in stored_digests(self._layout.packs, _SUFFIX) if pack[0].hex not in known]

    def forget(self, digests: Iterable[Digest] | None = None) -> None:
        """Forget that packs are there: these, or all. Locations are another matter."""
        keys = [key for key, _ in self._index.iterate(_PACK)] if digests is None else [d.hex for d in digests]
        for kind in (_PACK, _USED, "checked") if digests is not None else (_PACK,):
            self._index.delete(kind, keys)

    def locate_again(self, wanted: Iterable[Digest], but_not: Collection[str] = ()) -> None:
        """Look for tensors in the headers of all packs but those at some paths, and record where they lie."""
        missing = set(wanted)
        checksums = self._facts.checksums(missing)
        for digest, path in stored_digests(self._layout.packs, _SUFFIX) if missing else ():
            if path in but_not:
                continue
            try:
                layout, refs = named_pack(path, digest)
            except (StoreError, FileNotFoundError):
                continue
            held = [
                Finished(name, ref, checksums.get(ref.digest), None)
                for name, ref in refs.items()
                if ref.digest in missing
            ]
            self._facts.set_locations({entry.ref.digest: place(path, layout, entry) for entry in held})
            missing -= {entry.ref.digest for entry in held}


def place(path: str, layout: PackLayout, entry: Finished) -> Location:
    """Where a tensor of a file with that layout lies."""
    return Location(path, layout.offset(entry.name), entry.ref.spec.nbytes, entry.xxh3)


def _within(known: Json, now: int) -> bool:
    return isinstance(known, int) and now - known < _MINUTE


def named_pack(path: str, digest: Digest) -> tuple[PackLayout, dict[str, TensorRef]]:
    """What the header of a pack says, if it is the one of that name; raises StoreError, FileNotFoundError."""
    layout, refs = read_pack_header(path)
    if layout.digest(refs) != digest:
        raise damaged(path, "another pack than its name says", "delete this file")
    return layout, refs


def _entries(refs: Mapping[str, TensorRef]) -> list[Finished]:
    return [Finished(name, ref, None, None) for name, ref in refs.items()]
