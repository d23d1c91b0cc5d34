"""The local store: one object over packs, facts, manifests, files and roots.

Absent is None, broken is a StoreError, doing it twice is harmless. Any thread, and any number of processes, may use one
store at once.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from kittybuild.digest import Digest, tagged
from kittybuild.model.manifest import Manifest
from kittybuild.store.disk import Disk
from kittybuild.store.facts import Location
from kittybuild.store.format import DELETE, USE, VERSION, Format, checked_format, mend_format, migrate
from kittybuild.store.index import Index
from kittybuild.store.inside import Inside
from kittybuild.store.layout import Layout
from kittybuild.store.leases import Leases
from kittybuild.store.locks import convert, held, release, take
from kittybuild.store.problems import DamagedTensor, cannot_open, failure, guarded
from kittybuild.store.reserve import free_reserve, make_reserve
from kittybuild.store.roots import Root
from kittybuild.store.unfinished import Salvaged
from kittybuild.store.writer import PATIENCE, FinishedPack, PackWriter
from kittybuild.tensors import TensorRef, TensorSpec

if TYPE_CHECKING:  # care is taken of a store now and then, and costs its imports then only
    from kittybuild.store.check import Checked, Extent
    from kittybuild.store.gc import Collected, GcPlan, Policy
    from kittybuild.store.info import StoreInfo
    from kittybuild.store.repair import Repaired
    from kittybuild.store.usage import Use

__all__ = [
    "DamagedTensor",
    "FinishedPack",
    "Location",
    "PackWriter",
    "Root",
    "Salvaged",
    "Store",
]

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT)
_META, _COMPLETE = "meta", "complete"


class Store:
    """An open store; `close` it, or use it as a context manager."""

    def __init__(self, disk: Disk, paths: Layout, index: Index, lock: int) -> None:
        self.disk = disk
        self.root = paths.root
        self._paths = paths
        self._lock: int | None = lock
        self.leases = Leases(disk, paths)
        self._use(index)

    def _use(self, index: Index) -> None:
        """Work over an index from now on."""
        self._index = index
        self._inside = inside = Inside.of(self.disk, self._paths, index)
        self._facts, self._packs, self._content = inside.facts, inside.packs, inside.content
        self._roots, self._unfinished = inside.roots, inside.unfinished

    @classmethod
    def open(cls, root: str, *, disk: Disk | None = None, to_clean: bool = False) -> Store:
        """Open the store at `root`, or make one there. An index that is lost or corrupt is made anew.

        `to_clean`: give back the reserve first, so that it works on a full disk. `collect` makes it again.
        """
        disk, paths = disk or Disk(), Layout(os.path.abspath(root))
        operation = DELETE if to_clean else USE
        _prepare(disk, paths, operation)
        if to_clean:
            free_reserve(disk, paths)
        lock = take(disk, paths.lock("store"), exclusive=False, patience=PATIENCE)
        try:
            checked_format(paths, operation)  # it may have been migrated while we waited
            with held(disk, paths.lock("index"), exclusive=True, patience=PATIENCE):
                store = cls(disk, paths, _open_index(disk, paths), lock)
                store._complete()
        except BaseException:
            release(disk, paths.lock("store"), lock)
            raise
        return store

    @classmethod
    def mend_format(cls, root: str, *, disk: Disk | None = None) -> bool:
        """Write the file FORMAT anew if it is damaged or lost; whether that was needed."""
        return mend_format(disk or Disk(), root)

    @classmethod
    def exists(cls, root: str) -> bool:
        """Whether there is a store at `root`, of whatever format."""
        return os.path.isfile(Layout(os.path.abspath(root)).format)

    def close(self) -> None:
        """Let go of the store; twice is fine."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            with guarded("close", self.root):
                self._packs.note_used()
                self.leases.close()
                self._unfinished.close()
                self._index.close()
                self.disk.close(lock)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Facts: what derivations made, where tensors lie, what source files hold.

    def realisations(self, keys: Iterable[Digest]) -> dict[Digest, TensorRef]:
        """What derivations are known to make; only the known ones."""
        return self._facts.realisations(keys)

    def realisation(self, key: Digest) -> TensorRef | None:
        """What one derivation is known to make."""
        return self.realisations([key]).get(key)

    def realise(self, facts: Mapping[Digest, TensorRef]) -> None:
        """Record what derivations made. What was known stays; raises StoreError if it differs."""
        self._facts.realise(facts)

    def nonfinite(self, digests: Iterable[Digest]) -> dict[Digest, int]:
        """How many elements of tensors are known to be NaN or infinite; only those that have some."""
        return self._facts.nonfinite(digests)

    def set_nonfinite(self, facts: Mapping[Digest, int]) -> None:
        """Record how many elements of tensors are NaN or infinite."""
        self._facts.set_nonfinite(facts)

    def set_costs(self, facts: Mapping[Digest, float]) -> None:
        """Record how many seconds it took to make tensors: garbage collection lets the cheap ones go first."""
        self._facts.set_costs(facts)

    def costs(self, digests: Iterable[Digest]) -> dict[Digest, float]:
        """How many seconds it took to make tensors; only the known ones."""
        return self._facts.costs(digests)

    def locations(self, digests: Iterable[Digest]) -> dict[Digest, Location]:
        """Where tensors lie; only those whose file is there and long enough."""
        return self._facts.locations(digests)

    def location(self, digest: Digest) -> Location | None:
        """Where one tensor lies."""
        return self.locations([digest]).get(digest)

    def memos(self, file_key: Digest) -> dict[str, Digest]:
        """What is known of the tensors in one source file: name -> digest."""
        return self._facts.memos(file_key)

    def some_memos(self, wanted: Iterable[tuple[Digest, str]]) -> dict[tuple[Digest, str], Digest]:
        """What is known of some source tensors, by file key and name; only the known ones."""
        return self._facts.some_memos(wanted)

    def remember(self, file_key: Digest, facts: Mapping[str, Digest]) -> None:
        """Add to what is known of one source file."""
        self._facts.remember(file_key, facts)

    def shortcut(self, key: Digest) -> Digest | None:
        """The manifest that a whole stage is known to give; it may be gone."""
        return self._facts.shortcut(key)

    def set_shortcut(self, key: Digest, manifest: Digest) -> None:
        """Record the manifest of a whole stage."""
        self._facts.set_shortcut(key, manifest)

    # Content: manifests and companion files.

    def manifest(self, digest: Digest) -> Manifest | None:
        """A manifest, verified; a damaged one is removed and absent."""
        return self._content.manifest(digest)

    def put_manifest(self, manifest: Manifest) -> Digest:
        """Keep a manifest. Its realisations are recorded too, so it must be one that we made or trust."""
        return self._content.put_manifest(manifest)

    def file(self, digest: Digest) -> str | None:
        """The path of a companion file, not verified."""
        return self._content.file(digest)

    def put_file(self, data: bytes) -> Digest:
        """Keep a companion file."""
        return self._content.put_file(data)

    def read_file(self, digest: Digest) -> bytes | None:
        """The bytes of a companion file, verified; a damaged one is removed and absent."""
        return self._content.read_file(digest)

    # Packs.

    def pack(self, digest: Digest) -> str | None:
        """The path of a complete pack. Its size is checked, its tensors are not read."""
        with guarded("read", self._paths.pack(digest)):
            return self._packs.path(digest)

    def write_pack(self, tensors: Iterable[tuple[str, TensorSpec]]) -> PackWriter:
        """Begin a pack of these tensors; a salvaged one of the same layout is gone on with in place."""
        return self._inside.write_pack(tensors)

    def salvage(self) -> Salvaged:
        """Adopt what interrupted processes left: packs not in the index, finished tensors of unfinished packs."""
        self._inside.learn()
        return self._unfinished.salvage()

    def expect_unfinished(self) -> None:
        """Count on what interrupted processes left, as the next build will that salvages it. For who only plans."""
        self._facts.expect(*self._unfinished.claims())

    def drop_salvaged(self) -> None:
        """After a finished build: delete the unfinished packs that `salvage` adopted."""
        self._unfinished.drop()

    def discard(self, location_path: str) -> None:
        """Set a damaged file aside and forget what lay in it, but for what is still good or lies elsewhere too."""
        self._unfinished.discard(location_path)

    # Roots, and the store as a whole.

    def set_root(
        self, name: str, folder: str, manifest: Digest, also: Iterable[Digest] = (), recipe: str | None = None
    ) -> None:
        """Keep a manifest, and all that it needs, for the output `name` in `folder`; `also`: more manifests and files.

        `recipe`: the path of the recipe that made it, for whoever repairs the store.
        """
        self._roots.set(Root(name, folder, manifest, tuple(also), recipe))

    def drop_root(self, name: str, folder: str) -> None:
        """Keep nothing for that output; absent is fine."""
        self._roots.drop(name, folder)

    def roots(self) -> tuple[Root, ...]:
        """All roots."""
        return self._roots.all()

    def info(self) -> StoreInfo:
        """What the store holds, in numbers."""
        from kittybuild.store.info import store_info

        with guarded("read", self.root):
            return store_info(self._paths, self._facts, self._roots)

    def rebuild_index(self) -> None:
        """Read all packs and manifests again. What cannot be read from them (memos, shortcuts) is kept as it is."""
        self._packs.forget()
        self._content.forget()
        self._inside.learn()

    def plan_gc(self, policy: Policy) -> GcPlan:
        """What `collect` would delete now. Changes nothing."""
        from kittybuild.store.gc import plan_gc

        with guarded("read", self.root):
            return plan_gc(self._inside, policy)

    def collect(self, policy: Policy, *, patience: float = PATIENCE) -> Collected:
        """Delete what no root keeps and the policy lets go. Raises StoreError KB707 while others use the store.

        Packs of which little is worth keeping are written anew, smaller, before they are deleted.
        """
        from kittybuild.store.gc import collect, plan_gc, repack

        with guarded("collect in", self.root):
            checked_format(self._paths, DELETE)
            with self._alone(patience):
                first = plan_gc(self._inside, policy)
                done = collect(self._inside, first)
            if repacked := repack(self._inside, first):
                with self._alone(patience):
                    done = done.plus(collect(self._inside, plan_gc(self._inside, policy)), repacked)
            make_reserve(self.disk, self._paths)
        return done

    def check(self, extent: Extent | None = None) -> Checked:
        """Compare what the store holds with its names."""
        from kittybuild.store.check import Extent, check

        with guarded("check", self.root):
            return check(self._inside, extent or Extent())

    def repair(self, extent: Extent | None = None) -> Repaired:
        """Check, set aside what is damaged, and put it together again from what is good elsewhere."""
        from kittybuild.store.repair import repair

        with guarded("repair", self.root):
            found = self.check(extent).damage
            if any(damage.kind == "index" for damage in found):
                self._renew_index()
                found = tuple(damage for damage in found if damage.kind == "index") + self.check(extent).damage
            done = repair(self._inside, found)
            make_reserve(self.disk, self._paths)
            return done

    def used_by(self) -> tuple[Use, ...]:
        """What each output needs of the store."""
        from kittybuild.store.usage import used_by

        with guarded("read", self.root):
            return used_by(self._inside)

    def _renew_index(self) -> None:
        """Move a damaged index aside and make a new one from packs and manifests."""
        with held(self.disk, self._paths.lock("index"), exclusive=True, patience=PATIENCE):
            self._index.close()
            _move_aside(self.disk, self._paths)
            self._use(_open_index(self.disk, self._paths))
            self._complete()

    def _complete(self) -> None:
        """See that the index knows all packs and manifests, if it is new."""
        if self._index.get(_META, _COMPLETE) != 1:
            self._inside.learn()
            self._index.put_many(_META, {_COMPLETE: 1})

    @contextmanager
    def _alone(self, patience: float) -> Iterator[None]:
        """Be the only one that has the store open: what others may use can be deleted."""
        assert self._lock is not None  # the store is open
        path = self._paths.lock("store")
        try:
            convert(path, self._lock, exclusive=True, patience=patience)
            yield
        finally:
            convert(path, self._lock, exclusive=False, patience=PATIENCE)

    @contextmanager
    def output_lock(self, folder: str) -> Iterator[None]:
        """Be the only one to publish into `folder`; waits for another that does."""
        name = tagged("kittybuild.output.v1", os.path.realpath(folder)).hex
        with held(self.disk, self._paths.lock(name), exclusive=True, patience=PATIENCE):
            yield


def _prepare(disk: Disk, paths: Layout, operation: str) -> None:
    """See that the folder is a store of our format, and make what is missing of it."""
    try:
        found = checked_format(paths, operation)
        for folder in (paths.root, *paths.folders):
            disk.makedirs(folder)
        if found is None:
            make_reserve(disk, paths)
            disk.write_file(paths.format, Format().to_bytes(), mode=0o644)
        elif found.version < VERSION:
            migrate(disk, paths, PATIENCE)
        disk.close(disk.open_lock(paths.lock("store")))
    except OSError as error:
        refused = error.errno in _REFUSED
        raise cannot_open(paths.root, error) if refused else failure(error, "open", paths.root) from error


def _open_index(disk: Disk, paths: Layout) -> Index:
    with guarded("open the index", paths.index):
        return Index.open(paths.index, disk, lambda: _move_aside(disk, paths))


def _move_aside(disk: Disk, paths: Layout) -> None:
    """Move a corrupt index to where it harms nobody."""
    with guarded("move aside", paths.index), suppress(FileNotFoundError):  # another process was first
        disk.rename(paths.index, os.path.join(paths.tmp, f"damaged-index-{os.urandom(16).hex()}"))
