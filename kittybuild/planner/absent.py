"""Sources whose files are not here, but that a lock pins: their headers and small files come from caches.

They are laid out in a folder as the source is, with files of weights that have nothing but their headers: enough for
a plan. Their tensors are known by what is claimed of the files; nobody can read their bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kittybuild.checkpoint.opening import open_source
from kittybuild.checkpoint.source import Checkpoint, FileId
from kittybuild.digest import Digest
from kittybuild.errors import SourceError
from kittybuild.model.lock import FilePin, Pin
from kittybuild.planner.offers import Offers
from kittybuild.store.problems import guarded
from kittybuild.store.remote.claims import SourceFacts
from kittybuild.store.store import Store


@dataclass(frozen=True)
class Absent:
    """A source that is not here. `files`: its files of weights, known by content, by their paths in the layout."""

    files: Mapping[str, FileId]
    where: str

    def refuse(self) -> SourceError:
        """The error where the bytes of its weights are needed."""
        message = "its weights are not on this machine, and no cache has what is made of them"
        return SourceError("KB260", message, at=self.where, hint="bring the files, or push from where it was built")


def open_absent(name: str, pin: Pin, store: Store, offers: Offers) -> tuple[Checkpoint, Absent]:
    """The checkpoint that a pin names, as far as caches know it. Raises SourceError KB260, or for its headers."""
    top = os.path.join(store.root, "views", pin.fingerprint.hex)
    weights: dict[str, tuple[FileId, SourceFacts]] = {}
    for file in pin.files:
        path = os.path.join(top, *file.name.split("/"))
        facts = offers.caches.source(file.sha256 or "", file.size)
        if facts is None or not _lay(path, file, facts, store, offers):
            message = f"{file.name} is not on this machine, and no cache has it"
            hint = "bring the file, or push from where the recipe was built; and trust the key that signed it"
            raise SourceError("KB260", message, at=name, hint=hint)
        if facts.whole is None:
            weights[path] = FileId(path, file.size, content=file.sha256 or ""), facts
    only = pin.files[0].name if len(pin.files) == 1 else ""
    found = open_source(os.path.join(top, only))
    for known, facts in weights.values():
        store.remember(known.key(), facts.tensors)
        offers.add(set(facts.tensors.values()))
    files = tuple(_by_content(file, weights) for file in found.files)
    return replace(found, where=name, files=files), Absent({p: known for p, (known, _) in weights.items()}, name)


def _by_content(file: FileId, weights: Mapping[str, tuple[FileId, SourceFacts]]) -> FileId:
    return next((known for path, (known, _) in weights.items() if os.path.realpath(path) == file.path), file)


def _lay(path: str, file: FilePin, facts: SourceFacts, store: Store, offers: Offers) -> bool:
    """See that a file, or what stands for it, is in its place. Raises StoreError."""
    known = facts.header if facts.whole is None else (facts.whole, file.size)
    if known is None:
        return False
    if _begins(path, file.size, *known):
        return True
    data = offers.caches.blob(*known)
    if data is None or (facts.whole is not None and hashlib.sha256(data).hexdigest() != file.sha256):
        return False
    with guarded("write", path, len(data)):
        store.disk.makedirs(os.path.dirname(path))
        store.disk.write_file(path, data, mode=0o644, size=file.size)
    return True


def _begins(path: str, size: int, digest: Digest, nbytes: int) -> bool:
    """Whether there is a file of that size that begins with these bytes: it may have been damaged since it was made."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size == size and Digest.of(file.read(nbytes)) == digest
    except OSError:
        return False
