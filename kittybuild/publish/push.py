"""Push what was built to a remote cache: blobs first, then what is claimed of them, so that no claim leads nowhere.

Every blob is digested before it is sent, and every source file before anything is claimed of it.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from kittybuild.checkpoint.source import Checkpoint, FileId
from kittybuild.checkpoint.sources.cached import digests
from kittybuild.digest import Digest
from kittybuild.errors import RemoteError, SourceError
from kittybuild.executor.budget import Admission
from kittybuild.executor.events import Events
from kittybuild.model.derivation import SourceTensor
from kittybuild.model.manifest import Manifest
from kittybuild.planner.known import Known, pinned_memo_name
from kittybuild.store.problems import DamagedTensor
from kittybuild.store.remote.bucket import Bucket, Unreachable
from kittybuild.store.remote.cache import GROUPED, Cache
from kittybuild.store.remote.cache import RAW as PLAIN
from kittybuild.store.remote.claims import Output, SourceFacts, outputs_claim, source_claim, stage_key
from kittybuild.store.remote.gc import DAY
from kittybuild.store.remote.keys import SigningKey
from kittybuild.store.remote.names import SOURCES, STAGES, TRACES
from kittybuild.store.remote.roots import Root, all_roots, former, put_root
from kittybuild.store.remote.substituters import STREAMS
from kittybuild.store.store import Store

IN_FLIGHT = 256 << 20
FRESH = DAY / 2
"""Nothing that was put so lately is collected before a push is done: collection spares what is younger than a day."""
T = TypeVar("T")

_HEADED = (".safetensors", ".gguf")
_SHA256 = 64


@dataclass(frozen=True)
class Pushed:
    """What a push did: blobs sent and those that were there, bytes sent, claims and facts about sources signed."""

    blobs: int
    there: int
    bytes: int
    claims: int
    sources: int


@dataclass(frozen=True)
class _Blob:
    """Bytes to send: a range of a file, by digest. `element`: the size of one element in bytes."""

    digest: Digest
    path: str
    offset: int
    nbytes: int
    element: int = 1


@dataclass(frozen=True)
class Pushing:
    """Where a push goes, who signs it, whether blobs are compressed, and the name under which the cache keeps it."""

    cache: Cache
    key: SigningKey
    events: Events
    zstd: bool = False
    name: str = ""

    @property
    def form(self) -> str:
        """The form in which blobs travel."""
        return GROUPED if self.zstd else PLAIN


def push(
    to: Pushing, store: Store, manifests: Mapping[str, Manifest], wanted: Iterable[str], known: Known | None = None
) -> Pushed:
    """Push the tensors of the `wanted` stages and claims of all; `known`: with facts about the sources behind them.

    Raises RemoteError KB802, KB806 or KB809, StoreError KB710.
    """
    sources = dict(_source_facts(known)) if known else {}
    blobs = {blob.digest: blob for name in wanted for blob in _blobs(manifests[name], store)}
    blobs |= {blob.digest: blob for _, more in sources.values() for blob in more}
    outputs = [made for made in (_outputs(manifest, store) for manifest in manifests.values()) if made]
    root = _root(to, blobs, outputs, sources)
    with _reached(to.cache):
        cache = to.cache.tell(to.form)
        before = former(cache.bucket, root)
        put_root(cache.bucket, root)  # first, so that whoever collects meanwhile knows what is needed
        sent = _send(to, cache, list(blobs.values()), root, before)
        claims = sum(_claim(to, cache, made) for made in outputs)
        for sha256, (facts, _) in sources.items():
            cache.put_claim(SOURCES, sha256, to.key.name, source_claim(sha256, facts, to.key))
    there = sum(nbytes is None for nbytes in sent)
    return Pushed(len(sent) - there, there, sum(nbytes or 0 for nbytes in sent), claims, len(sources))


def push_folder(to: Pushing, store: Store, folder: str) -> Pushed:
    """Push the output in a folder, of which the store knows what it is. Raises RemoteError KB806 where it does not."""
    place = os.path.realpath(folder)
    root = next((root for root in store.roots() if os.path.realpath(root.folder) == place), None)
    manifest = store.manifest(root.manifest) if root else None
    if root is None or manifest is None:
        hint = "push from the machine that built it, with the same --store; or push the recipe"
        raise RemoteError("KB806", "this store built no output in this folder", at=folder, hint=hint)
    return push(replace(to, name=to.name or root.name), store, {root.name: manifest}, (root.name,))


def open_to_push(bucket: Bucket) -> Cache:
    """The cache in a bucket. Raises RemoteError KB802 or KB807."""
    try:
        return Cache.open(bucket)
    except Unreachable as error:
        raise _unreachable(bucket.where, error) from error


@contextmanager
def _reached(cache: Cache) -> Iterator[None]:
    try:
        yield
    except Unreachable as error:
        raise _unreachable(cache.where, error) from error


def _unreachable(where: str, error: Unreachable) -> RemoteError:
    hint = "check address, rights and connection, then push again: what is there is not sent twice"
    return RemoteError("KB802", f"cannot push to this cache: {error}", at=where, hint=hint)


def _blobs(manifest: Manifest, store: Store) -> Iterator[_Blob]:
    """The tensors of an output, where they lie."""
    digest_of = {tensor.ref.digest: tensor for tensor in manifest.tensors if tensor.ref.spec.nbytes}
    found = store.locations(digest_of)
    for digest, tensor in digest_of.items():
        if digest not in found:
            raise RemoteError("KB806", f"{tensor.name} is not in the store any more", hint="build it again, then push")
        at = found[digest]
        yield _Blob(digest, at.path, at.offset, at.nbytes, tensor.ref.spec.dtype.size)


def _root(to: Pushing, blobs: Iterable[Digest], outputs: Iterable[Sequence[Output]], sources: Iterable[str]) -> Root:
    """What the cache keeps for this push."""
    traces = {output.key.hex for made in outputs for output in made}
    stages = {stage_key(output.key for output in made).hex for made in outputs}
    claims = {TRACES: frozenset(traces), STAGES: frozenset(stages), SOURCES: frozenset(sources)}
    return Root(to.name, to.key.name, frozenset(blobs), claims)


def _send(to: Pushing, cache: Cache, blobs: Sequence[_Blob], root: Root, before: frozenset[Digest]) -> list[int | None]:
    """Send blobs side by side; for each the bytes that went, None if it was there. `before`: what `root` kept."""
    room = Admission(IN_FLIGHT)
    to.events.stage("push", sum(blob.nbytes for blob in blobs))
    there = dict(zip(blobs, _side_by_side(lambda blob: cache.has(blob.digest, blob.nbytes), blobs), strict=True))
    # Who collects may have chosen what is old and no root's, before ours was there: that is sent again.
    doubtful = {b.digest for b, told in there.items() if told and told.put < time.time() - FRESH} - before
    others = [other.blobs for other, _ in all_roots(cache.bucket) if other.place != root.place] if doubtful else []
    kept = before.union(*others)

    def send(blob: _Blob) -> int | None:
        try:
            if there[blob] and (blob.digest not in doubtful or blob.digest in kept):
                return None
            with room.admit(blob.nbytes), _mapped(blob) as data:
                if Digest.of(data) != blob.digest:
                    raise DamagedTensor(blob.path, f"the bytes at {blob.offset:,} are not tensor {blob.digest}")
                return cache.put_blob(blob.digest, data, to.form, blob.element)
        finally:
            to.events.advance(blob.nbytes)

    return _side_by_side(send, blobs)


def _side_by_side(work: Callable[[_Blob], T], blobs: Sequence[_Blob]) -> list[T]:
    with ThreadPoolExecutor(STREAMS) as threads:
        begun = [threads.submit(work, blob) for blob in blobs]
        try:
            return [done.result() for done in begun]
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


@contextmanager
def _mapped(blob: _Blob) -> Iterator[memoryview]:
    """The bytes of a blob, mapped; they are read when they are sent."""
    start = blob.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with open(blob.path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), blob.offset - start + blob.nbytes, offset=start, access=mmap.ACCESS_READ)
    view = memoryview(mapped)[blob.offset - start :]
    try:
        yield view
    finally:
        view.release()


def _outputs(manifest: Manifest, store: Store) -> list[Output]:
    """What the derivations of a stage make, with the time that each took here."""
    made = [(tensor.key, tensor.ref) for tensor in manifest.tensors if tensor.key is not None]
    costs = store.costs(ref.digest for _, ref in made)
    ms = {digest: round(seconds * 1000) for digest, seconds in costs.items()}
    return [Output(key, ref, ms.get(ref.digest)) for key, ref in made]


def _claim(to: Pushing, cache: Cache, outputs: Sequence[Output]) -> int:
    """Sign what a stage's derivations make: one claim for each, and one for the stage; their number."""
    with ThreadPoolExecutor(STREAMS) as threads:
        list(threads.map(lambda output: _put(to, cache, TRACES, output.key, [output]), outputs))
    _put(to, cache, STAGES, stage_key(output.key for output in outputs), outputs)
    return len(outputs) + 1


def _put(to: Pushing, cache: Cache, kind: str, about: Digest, outputs: Sequence[Output]) -> None:
    cache.put_claim(kind, about.hex, to.key.name, outputs_claim(kind, about, outputs, to.key))


def _source_facts(known: Known) -> Iterator[tuple[str, tuple[SourceFacts, tuple[_Blob, ...]]]]:
    """What is known of each source file, by its SHA-256, and the blobs that go with it: headers and small files."""
    for source, checkpoint in known.sources.checkpoints.items():
        if source in known.sources.absent:
            continue
        names = {_real(file): sha for file in checkpoint.files if (sha := _sha256(file)) is not None}
        tensors = _memos(known, source, names)
        for file in checkpoint.files:
            if sha256 := names.get(_real(file)):
                yield sha256, _facts_of(file, checkpoint, tensors.get(_real(file), {}))


def _real(file: FileId) -> str:
    return os.path.realpath(file.path)


def _sha256(file: FileId) -> str | None:
    """The SHA-256 of a file: as its pin says, if it was verified, else of its bytes. None: only ranges are here."""
    if file.content:
        return file.content if file.whole and len(file.content) == _SHA256 else None
    found = digests(file.path)[0]
    if FileId.of(file.path) != file:
        raise SourceError("KB210", "the file changed during the push", at=file.path, hint="push again")
    return found


def _memos(known: Known, source: str, names: Mapping[str, str]) -> dict[str, dict[str, Digest]]:
    """The digests of a source's tensors by file, and by the names that memos of pinned files have for them."""
    found: dict[str, dict[str, Digest]] = {}
    for given, ref in known.contents():
        if not isinstance(given, SourceTensor) or given.source != source:
            continue
        entry = known.entry(given)
        others = [names.get(os.path.realpath(path)) for path in entry.files[1:]]
        if None not in others:
            keys = [FileId("", 0, content=str(sha)).key() for sha in others]
            found.setdefault(os.path.realpath(entry.file), {})[pinned_memo_name(entry, keys)] = ref.digest
    return found


def _facts_of(
    file: FileId, checkpoint: Checkpoint, tensors: Mapping[str, Digest]
) -> tuple[SourceFacts, tuple[_Blob, ...]]:
    parts = [part for entry in checkpoint.entries.values() for part in (entry, *entry.parts)]
    starts = [part.offset for part in parts if os.path.realpath(part.file) == _real(file)]
    if not starts:
        return _small(file, file.size, whole=True)
    if file.path.endswith(_HEADED) or checkpoint.where.endswith(_HEADED):
        facts, blobs = _small(file, min(starts), whole=False)
        return SourceFacts(file.size, None, facts.header, tensors), blobs
    return SourceFacts(file.size, None, None, tensors), ()


def _small(file: FileId, nbytes: int, *, whole: bool) -> tuple[SourceFacts, tuple[_Blob, ...]]:
    with open(file.path, "rb") as opened:
        data = opened.read(nbytes)
    digest = Digest.of(data)
    blobs = (_Blob(digest, file.path, 0, nbytes),) if nbytes else ()
    return SourceFacts(file.size, digest if whole else None, None if whole else (digest, nbytes), {}), blobs


__all__ = ["Pushed", "Pushing", "open_to_push", "push", "push_folder"]
