"""The contracts of stores: what holds for every bucket, every store of blobs and every store of realisations.

A check takes a store that can be written to and uses names of its own, so that it may be run again on the same one.
Absent is a value, twice is harmless, and what comes out is what went in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from kittybuild.digest import Digest
from kittybuild.store.remote.bucket import WINDOW, Bucket, Unreachable, stream, whole
from kittybuild.tensors import DType, TensorRef, TensorSpec

CLOCKS = 300.0
"""Seconds by which the clock of a server may be wrong."""


class BrokenContract(AssertionError):
    """What a store does otherwise than it must."""


class Blobs(Protocol):
    """Bytes by digest."""

    def put(self, data: bytes) -> Digest:
        """Keep some bytes; the BLAKE3 that they are named by."""

    def get(self, digest: Digest, nbytes: int) -> bytes | None:
        """The bytes of that name, verified; None: they are not there."""


class Realisations(Protocol):
    """What derivations make, by their keys."""

    def realise(self, facts: Mapping[Digest, TensorRef]) -> None:
        """Record what derivations made."""

    def realisations(self, wanted: Mapping[Digest, TensorSpec]) -> Mapping[Digest, TensorRef]:
        """What some derivations, each of an output of that dtype and shape, are known to make; only the known ones."""


def check_bucket(bucket: Bucket) -> None:
    """Check a bucket; raises BrokenContract."""
    for check in BUCKET.values():
        check(bucket)


def check_blobs(blobs: Blobs) -> None:
    """Check a store of blobs; raises BrokenContract."""
    for check in BLOBS.values():
        check(blobs)


def check_realisations(store: Realisations) -> None:
    """Check a store of realisations; raises BrokenContract."""
    for check in REALISATIONS.values():
        check(store)


# ---- buckets


def _absent(bucket: Bucket) -> None:
    name = _name()
    _same("a name that was never put", (bucket.read(name), bucket.head(name), whole(bucket, name, 10)), (None,) * 3)
    _same("a folder with nothing in it", list(bucket.list(name)), [])


def _put(bucket: Bucket) -> None:
    for data in (b"weights", b"", bytes(range(256)) * 100):
        name = _name()
        bucket.put(name, memoryview(data))
        piece, told = bucket.read(name), bucket.head(name)
        _same("what was put", piece and (bytes(piece.data), piece.total), (data, len(data)))
        _same("what is told of it", told and (told.name, told.size), (name, len(data)))
        _same("when it was put", told is not None and abs(told.put - time.time()) < CLOCKS, True)
        _same("the whole of it", whole(bucket, name, len(data)), data)


def _ranges(bucket: Bucket) -> None:
    name = _name()
    bucket.put(name, memoryview(b"weights"))
    for start, length, found in ((0, 2, b"we"), (3, 2, b"gh"), (5, 100, b"ts")):
        piece = bucket.read(name, start, length)
        _same(f"{length} bytes from {start}", piece and (bytes(piece.data), piece.total), (found, 7))


def _replaced(bucket: Bucket) -> None:
    name = _name()
    for data in (b"first", b"first", b"second!"):
        bucket.put(name, memoryview(data))
    _same("what was put last", whole(bucket, name, 7), b"second!")


def _windows(bucket: Bucket) -> None:
    name, data = _name(), bytes(range(256)) * (2 * WINDOW // 256 + 1)
    bucket.put(name, memoryview(data))
    pieces = [bytes(part) for part in stream(bucket, name, len(data)) or ()]
    _same("windows of a large object", [len(piece) for piece in pieces], [WINDOW, WINDOW, 256])
    _same("a large object", b"".join(pieces) == data, True)


def _bounded(bucket: Bucket) -> None:
    name = _name()
    bucket.put(name, memoryview(bytes(10_000)))
    try:
        whole(bucket, name, 100)
    except Unreachable as error:
        _same("more than was asked for", "10000 bytes, more than the 100" in str(error), True)
    else:
        raise BrokenContract("10,000 bytes came where 100 were asked for")


def _listed(bucket: Bucket) -> None:
    folder = _name()
    for name, data in ((f"{folder}/b.json", b"one"), (f"{folder}/a.json", b"three"), (f"{folder}0/b.json", b"other")):
        bucket.put(name, memoryview(data))
    told = sorted(bucket.list(folder), key=lambda one: one.name)
    _same("a folder", [(one.name, one.size) for one in told], [(f"{folder}/a.json", 5), (f"{folder}/b.json", 3)])
    _same("when they were put", all(abs(one.put - time.time()) < CLOCKS for one in told), True)


def _deleted(bucket: Bucket) -> None:
    name = _name()
    bucket.put(name, memoryview(b"x"))
    bucket.delete(name)
    bucket.delete(name)
    _same("a name that was deleted", (bucket.head(name), bucket.read(name)), (None, None))


# ---- blobs


def _no_blob(blobs: Blobs) -> None:
    data = os.urandom(100)
    _same("a blob that was never put", blobs.get(Digest.of(data), 100), None)


def _blobs(blobs: Blobs) -> None:
    for size in (1, 4095, 4096, 4097, 100_000):
        for data in (os.urandom(size), bytes(size)):
            digest = blobs.put(data)
            _same("a blob's name", digest, Digest.of(data))
            _same(f"a blob of {size} bytes", blobs.get(digest, size), data)


def _blob_twice(blobs: Blobs) -> None:
    data = os.urandom(5000)
    _same("the names of one blob", blobs.put(data), blobs.put(data))
    _same("a blob put twice", blobs.get(Digest.of(data), 5000), data)


# ---- realisations


def _no_realisation(store: Realisations) -> None:
    _same("a key that nobody recorded", dict(store.realisations({_digest(): TensorSpec(DType.F32, (2,))})), {})
    _same("no keys", dict(store.realisations({})), {})


def _realised(store: Realisations) -> None:
    shapes = ((), (0,), (7,), (3, 5), (2, 0, 4))
    facts = {_digest(): TensorRef(_digest(), TensorSpec(dtype, shape)) for dtype in DType for shape in shapes}
    store.realise(facts)
    found = store.realisations({key: ref.spec for key, ref in facts.items()})
    _same("what was recorded", dict(found), facts)


def _only_asked(store: Realisations) -> None:
    spec = TensorSpec(DType.BF16, (4, 4))
    facts = {_digest(): TensorRef(_digest(), spec) for _ in range(20)}
    store.realise(facts)
    few = dict(list(facts.items())[::3])
    found = store.realisations({**dict.fromkeys(few, spec), _digest(): spec})
    _same("some of what was recorded, and an unknown key", dict(found), few)


def _realised_twice(store: Realisations) -> None:
    key, ref = _digest(), TensorRef(_digest(), TensorSpec(DType.F16, (9,)))
    for _ in range(2):
        store.realise({key: ref})
    _same("what was recorded twice", dict(store.realisations({key: ref.spec})), {key: ref})


BUCKET: Mapping[str, Callable[[Bucket], None]] = MappingProxyType(
    {
        "what is absent is None": _absent,
        "what was put is read, and told of": _put,
        "a range is read alone": _ranges,
        "putting twice is harmless, and the last counts": _replaced,
        "large objects come in windows": _windows,
        "more than was asked for does not come": _bounded,
        "a folder lists what is in it, and no more": _listed,
        "deleting twice is harmless": _deleted,
    }
)
BLOBS: Mapping[str, Callable[[Blobs], None]] = MappingProxyType(
    {
        "what is absent is None": _no_blob,
        "what was put is read under its digest": _blobs,
        "putting twice is harmless": _blob_twice,
    }
)
REALISATIONS: Mapping[str, Callable[[Realisations], None]] = MappingProxyType(
    {
        "what nobody recorded is not known": _no_realisation,
        "what was recorded is known, for every dtype and shape": _realised,
        "only what is asked for is told": _only_asked,
        "recording twice is harmless": _realised_twice,
    }
)


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise BrokenContract(f"{what}: {found!r:.200}, not {wanted!r:.200}")


def _name() -> str:
    """A name that was never used; buckets know names of the forms of caches."""
    return f"contract/{os.urandom(8).hex()}"


def _digest() -> Digest:
    return Digest(os.urandom(32).hex())
