"""Caches that are asked before anything is made, and whom to believe.

A claim counts only with the signature of a trusted key, a blob only with the digest that was asked for. Whatever else
is wrong with a cache is a miss and a note, never an error and never data.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from blake3 import blake3
from xxhash import xxh3_64

from kittybuild.digest import Digest
from kittybuild.errors import RemoteError
from kittybuild.store.remote.bucket import Bucket, Unreachable
from kittybuild.store.remote.cache import Cache
from kittybuild.store.remote.claims import (
    LARGEST_CLAIM,
    LARGEST_TRACE,
    Output,
    Refused,
    SourceFacts,
    outputs_of,
    source_of,
    stage_key,
)
from kittybuild.store.remote.keys import PublicKey
from kittybuild.store.remote.names import SOURCES, STAGES, TRACES
from kittybuild.tensors import TensorRef, TensorSpec

STREAMS = 8
MOST_FAILURES = 3
"""So many requests in a row that fail, each tried several times, and a cache is left alone."""

Write = Callable[[int, memoryview], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Trust:
    """The keys that are believed, and how many of them must agree."""

    keys: tuple[PublicKey, ...]
    quorum: int = 1


@dataclass(frozen=True, slots=True)
class Claimed:
    """What trusted keys claim that a derivation makes, and the milliseconds that it took one of them."""

    ref: TensorRef
    signers: tuple[str, ...]
    ms: int | None = None


@dataclass
class _Votes:
    """What is claimed of one derivation: who says which."""

    signers: dict[TensorRef, set[str]] = field(default_factory=dict)
    ms: dict[TensorRef, int] = field(default_factory=dict)

    def add(self, output: Output, signer: str) -> None:
        """Count one claim."""
        self.signers.setdefault(output.ref, set()).add(signer)
        if output.ms is not None:
            self.ms[output.ref] = output.ms

    def decided(self, quorum: int) -> Claimed | None:
        """What enough signers say, and more than say anything else."""
        ranked = sorted(self.signers.items(), key=lambda item: (-len(item[1]), item[0].digest))
        if not ranked or len(ranked[0][1]) < quorum:
            return None
        if len(ranked) > 1 and len(ranked[1][1]) == len(ranked[0][1]):
            return None
        ref, names = ranked[0]
        return Claimed(ref, tuple(sorted(names)), self.ms.get(ref))


class Substituters:
    """The caches of one build, in the order in which they are asked. Any thread may use it."""

    def __init__(self, buckets: Sequence[Bucket], trust: Trust, note: Note) -> None:
        self.trust = trust
        self._buckets = tuple(buckets)
        self._note = note
        self._lock = threading.Lock()
        self._caches: tuple[Cache, ...] | None = None
        self._failures: dict[str, int] = {}
        self._said: set[str] = set()
        self._moved, self._seconds = 0, 0.0
        self.bytes_fetched = 0

    def realisations(
        self, wanted: Mapping[Digest, TensorSpec], stage: Collection[Digest] | None = None
    ) -> dict[Digest, Claimed]:
        """What is claimed, and believed, of some derivations. `stage`: the keys of all derivations of the stage that
        they belong to, if these are known: then one request a signer may answer for all."""
        votes: dict[Digest, _Votes] = {}
        if stage and len(stage) > 1:
            about = stage_key(stage)
            for cache, key, data in self._claims(STAGES, [about.hex], LARGEST_CLAIM):
                self._count(STAGES, about, cache, key, data, wanted, votes)
        missing = [key for key in wanted if key not in votes]
        for cache, key, data in self._claims(TRACES, [digest.hex for digest in missing], LARGEST_TRACE):
            self._count(TRACES, Digest(data[0]), cache, key, data, wanted, votes)
        found = {}
        for digest, vote in votes.items():
            if len(vote.signers) > 1:
                self._disagree(digest, vote)
            if claimed := vote.decided(self.trust.quorum):
                found[digest] = claimed
        return found

    def source(self, sha256: str, size: int) -> SourceFacts | None:
        """What trusted keys claim of a source file, if enough of them do and no two differ."""
        found: dict[str, SourceFacts] = {}
        for cache, key, (about, data) in self._claims(SOURCES, [sha256], LARGEST_CLAIM):
            try:
                facts = source_of(about, data, key)
                if facts.size != size:
                    raise Refused(f"it is about {facts.size} bytes")
                found[key.name] = facts
            except Refused as refused:
                self._refuse(cache, key, f"a source file {sha256[:12]}", refused)
        tensors = {(tuple(sorted(facts.tensors.items()))) for facts in found.values()}
        if len(tensors) > 1:
            self.note(f"{', '.join(sorted(found))} differ on the source file {sha256}: none of them is believed")
            return None
        return next(iter(found.values())) if len(found) >= self.trust.quorum else None

    def fetch(self, digest: Digest, nbytes: int, write: Write) -> str | None:
        """Bring a blob, handing its bytes to `write` as they come, and verify it; its XXH3-64.

        None: nobody has it, and what was written is void.
        """
        if nbytes == 0:
            return xxh3_64().hexdigest()
        for cache in self._open():
            began = time.monotonic()
            try:
                parts = cache.blob(digest, nbytes)
                if parts is None:
                    self._went_well(cache)
                    continue
                xxh3 = _verified(parts, digest, nbytes, write)
            except Unreachable as error:
                self._failed(cache, error)
                continue
            if xxh3 is None:
                self.note(f"{cache.where}: the blob {digest} is damaged: it is not used")
                continue
            self._went_well(cache)
            with self._lock:
                self._moved += nbytes
                self._seconds += time.monotonic() - began
                self.bytes_fetched += nbytes
            return xxh3
        return None

    def blob(self, digest: Digest, nbytes: int) -> bytes | None:
        """A small blob, verified; None: nobody has it."""
        parts = bytearray(nbytes)

        def write(offset: int, data: memoryview) -> None:
            parts[offset : offset + len(data)] = data

        return bytes(parts) if self.fetch(digest, nbytes, write) else None

    def seconds(self, nbytes: int) -> float | None:
        """How long so many bytes take, as fast as they came so far and with all streams busy; None: not known yet."""
        with self._lock:
            return nbytes * self._seconds / self._moved / STREAMS if self._moved >= 1 << 20 else None

    def note(self, text: str) -> None:
        """Tell something once."""
        with self._lock:
            known = text in self._said
            self._said.add(text)
        if not known:
            self._note(text)

    def _open(self) -> tuple[Cache, ...]:
        """The caches that can be used."""
        with self._lock:
            if self._caches is None:
                self._caches = tuple(self._opened())
            return tuple(c for c in self._caches if self._failures.get(c.where, 0) < MOST_FAILURES)

    def _opened(self) -> Iterator[Cache]:
        for bucket in self._buckets:
            try:
                yield Cache.open(bucket)
            except Unreachable as error:
                self._note(f"{bucket.where} cannot be reached, so nothing is taken from it: {error}")
            except RemoteError as error:
                self._note(str(error))

    def _claims(
        self, kind: str, abouts: Sequence[str], most: int
    ) -> Iterator[tuple[Cache, PublicKey, tuple[str, bytes]]]:
        """All claims by names of trusted keys, from all caches, asked for side by side."""
        asked = [(cache, key, about) for cache in self._open() for key in self.trust.keys for about in abouts]
        if not asked:
            return

        def ask(request: tuple[Cache, PublicKey, str]) -> bytes | None:
            cache, key, about = request
            if self._failures.get(cache.where, 0) >= MOST_FAILURES:
                return None
            try:
                data = cache.claim(kind, about, key.name, most)
            except Unreachable as error:
                self._failed(cache, error)
                return None
            self._went_well(cache)
            return data

        with ThreadPoolExecutor(min(STREAMS, len(asked))) as threads:
            for (cache, key, about), data in zip(asked, threads.map(ask, asked), strict=True):
                if data is not None:
                    yield cache, key, (about, data)

    def _count(
        self,
        kind: str,
        about: Digest,
        cache: Cache,
        key: PublicKey,
        data: tuple[str, bytes],
        wanted: Mapping[Digest, TensorSpec],
        votes: dict[Digest, _Votes],
    ) -> None:
        try:
            outputs = outputs_of(kind, about, data[1], key)
            wrong = [o for o in outputs if o.key in wanted and o.ref.spec != wanted[o.key]]
            if wrong:
                raise Refused(f"it gives {wrong[0].ref.spec} for {wanted[wrong[0].key]}")
        except Refused as refused:
            self._refuse(cache, key, f"{kind}/{about.hex[:12]}", refused)
            return
        for output in outputs:
            if output.key in wanted:
                votes.setdefault(output.key, _Votes()).add(output, key.name)

    def _disagree(self, digest: Digest, vote: _Votes) -> None:
        sides = "; ".join(
            f"{', '.join(sorted(names))}: {ref.spec} {ref.digest}"
            for ref, names in sorted(vote.signers.items(), key=lambda item: item[0].digest)
        )
        decided = vote.decided(self.trust.quorum)
        way = f"{decided.ref.digest} has the more votes" if decided else "none is believed, it is computed here"
        self.note(f"signers disagree on what derivation {digest} makes: {sides}: {way}")

    def _refuse(self, cache: Cache, key: PublicKey, what: str, refused: Refused) -> None:
        self.note(f"{cache.where}: what {key.name} is said to claim of {what} is refused: {refused}")

    def _failed(self, cache: Cache, error: Unreachable) -> None:
        with self._lock:
            self._failures[cache.where] = self._failures.get(cache.where, 0) + 1
            over = self._failures[cache.where] == MOST_FAILURES
        self.note(f"{cache.where}: {error}")
        if over:
            self.note(f"{cache.where} failed {MOST_FAILURES} times in a row: nothing more is asked of it")

    def _went_well(self, cache: Cache) -> None:
        with self._lock:
            if self._failures.get(cache.where, 0) < MOST_FAILURES:
                self._failures[cache.where] = 0


def _verified(parts: Iterator[memoryview], digest: Digest, nbytes: int, write: Write) -> str | None:
    """Hand the bytes on; their XXH3-64 if they are the blob, else None."""
    strong, quick, at = blake3(), xxh3_64(), 0
    for part in parts:
        if at + len(part) > nbytes:
            return None
        strong.update(part)
        quick.update(part)
        write(at, part)
        at += len(part)
    return quick.hexdigest() if at == nbytes and strong.hexdigest() == digest.hex else None
