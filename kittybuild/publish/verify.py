"""A folder held against its kittybuild.json: every tensor and every file, one shard, or one tensor. It only reads.

Whatever is found is told; nothing found is no error here. An edited README is told apart: no program reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from blake3 import blake3

from kittybuild.checkpoint.reading import Files
from kittybuild.checkpoint.safetensors_file import read_safetensors
from kittybuild.checkpoint.source import Entry
from kittybuild.digest import Digest, Json
from kittybuild.errors import SourceError, UsageError, nearest
from kittybuild.publish.folder import ATTESTATION, PROVENANCE
from kittybuild.publish.provenance import README, Provenance
from kittybuild.tensors import TensorRef

CHUNK = 4 << 20
MISSING, EXTRA, CHANGED = "missing", "extra", "changed"


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what is not as it should be: (`missing`, `extra` or `changed`; `tensor` or `file`; name).

    `edited`: whether the README is not the one that was made.
    """

    tensors: int
    files: int
    findings: tuple[tuple[str, str, str], ...]
    edited: bool = False

    def to_json(self) -> dict[str, Json]:
        """As `verify --json` prints it."""
        named: dict[str, Json] = {
            how: {f"{kind}s": [name for h, k, name in self.findings if (h, k) == (how, kind)] for kind in _KINDS}
            for how in (MISSING, EXTRA, CHANGED)
        }
        return {"tensors": self.tensors, "files": self.files, **named, "readme_edited": self.edited}


_KINDS = ("tensor", "file")


def verify(folder: str, said: Provenance) -> Verified:
    """Every tensor and every file of a folder. What begins with a dot is nobody's."""
    tensors = list(_tensors(folder, said, said.shards))
    small = list(_small(folder, said.digests))
    known = {*said.digests, *said.shards, *said.listed, PROVENANCE, ATTESTATION}
    others = sorted(said.listed - {*said.digests, *said.shards})
    small += [(MISSING, "file", name) for name in others if not os.path.isfile(os.path.join(folder, name))]
    extra = [(EXTRA, "file", name) for name in file_names(folder) if name not in known]
    edited = (CHANGED, "file", README) in small
    found = [*tensors, *(one for one in small if one != (CHANGED, "file", README)), *extra]
    return Verified(len(said.tensors), len(known & {*said.digests, *said.shards}), tuple(found), edited)


def verify_shard(folder: str, said: Provenance, file: str) -> Verified:
    """One shard, whatever else of the folder is here. Raises UsageError KB016 for a file that is none."""
    if file not in said.shards:
        raise UsageError("KB016", f"there is no shard {file!r}", at=folder, hint=nearest(file, said.shards))
    names = said.shards[file]
    return Verified(len(names), 1, tuple(_tensors(folder, said, {file: names})))


def verify_tensor(folder: str, said: Provenance, name: str) -> Verified:
    """One tensor. Raises UsageError KB016 for a name that the manifest does not have."""
    if name not in said.tensors:
        raise UsageError("KB016", f"there is no tensor {name!r}", at=folder, hint=nearest(name, said.tensors))
    file = next(file for file, names in said.shards.items() if name in names)
    entries = _entries(os.path.join(folder, file))
    if entries is None:
        return Verified(1, 0, ((MISSING, "file", file),))
    with Files() as files:
        wrong = _wrong(entries.get(name), said.tensors[name], files)
    return Verified(1, 0, ((wrong, "tensor", name),) if wrong else ())


def digest_of(entry: Entry, files: Files) -> Digest:
    """The digest of a stored tensor's bytes. Raises SourceError."""
    hasher, reader = blake3(), files.reader(entry)
    buffer = memoryview(bytearray(min(CHUNK, entry.spec.nbytes)))
    for start in range(0, entry.spec.nbytes, CHUNK):
        part = buffer[: min(CHUNK, entry.spec.nbytes - start)]
        reader.read_into(start, part)
        hasher.update(part)
    return Digest(hasher.hexdigest())


def _tensors(folder: str, said: Provenance, shards: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str, str]]:
    wanted = said.tensors
    for file, names in shards.items():
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            yield MISSING, "file", file
            continue
        entries = _entries(path)
        if entries is None:
            yield CHANGED, "file", file
            continue
        with Files() as files:
            for name in names:
                if wrong := _wrong(entries.get(name), wanted[name], files):
                    yield wrong, "tensor", name
        for name in entries:
            if name not in names:
                yield EXTRA, "tensor", name


def _entries(path: str) -> Mapping[str, Entry] | None:
    """The tensors of a shard; None for what is no whole file of them."""
    try:
        return read_safetensors(path)
    except SourceError:
        return None


def _wrong(entry: Entry | None, ref: TensorRef, files: Files) -> str | None:
    if entry is None:
        return MISSING
    return None if entry.spec == ref.spec and digest_of(entry, files) == ref.digest else CHANGED


def _small(folder: str, digests: Mapping[str, Digest]) -> Iterator[tuple[str, str, str]]:
    for name, digest in digests.items():
        try:
            with open(os.path.join(folder, name), "rb") as file:
                if Digest.of(file.read()) != digest:
                    yield CHANGED, "file", name
        except OSError:
            yield MISSING, "file", name


def file_names(folder: str) -> Iterator[str]:
    """The files in a folder and the folders in it, by name; what begins with a dot is left out."""
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
