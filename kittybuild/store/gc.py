"""Garbage collection: first a plan, which is a value, then the deletion of just what it lists.

What roots keep is never touched. Of the rest, what was used long ago goes, and, to get below a size, what is cheap to
make again goes first. Realisations always stay: they are small, and save work even where the bytes are gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from kittybuild.digest import Digest
from kittybuild.errors import StoreError
from kittybuild.store.inside import Inside
from kittybuild.store.journal import Finished
from kittybuild.store.layout import JOURNAL, PART, TEMPORARY, stored_digests
from kittybuild.store.pack import PackLayout
from kittybuild.store.packs import named_pack, place
from kittybuild.store.problems import FULL, DamagedTensor
from kittybuild.store.usage import Kept, kept
from kittybuild.tensors import TensorRef

# Interrupted work is kept for a day: whoever makes room for a build wants to go on with it.
UNFINISHED_STAYS = 86_400.0
# Seconds to make a byte, where nobody measured it: a merge of a few models.
USUAL = 5e-9


@dataclass(frozen=True, slots=True)
class Policy:
    """What may stay although no root keeps it: up to `max_size` bytes of packs in all, used in the last `older_than`
    seconds. With neither, nothing stays. `now`: seconds since the epoch."""

    max_size: int | None = None
    older_than: float | None = None
    now: float = field(default_factory=time.time)

    @property
    def everything(self) -> bool:
        """Whether nothing without a root stays."""
        return self.max_size is None and self.older_than is None

    def expired(self, used: float) -> bool:
        """Whether what was last used then is too old."""
        return self.everything or (self.older_than is not None and used < self.now - self.older_than)


@dataclass(frozen=True, slots=True)
class Doomed:
    """One file to delete: its kind, how many bytes that frees (0 if it has another name), and seconds to make again."""

    kind: str
    path: str
    digest: Digest | None
    freed: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Pack:
    """A pack that no root keeps. `own`: the tensors that lie nowhere better, with the seconds to make them again."""

    digest: Digest
    path: str
    size: int
    freed: int
    used: float
    own: tuple[tuple[str, TensorRef], ...]
    seconds: float

    @cached_property
    def anew(self) -> int:
        """The bytes of a pack with only what is worth keeping."""
        return PackLayout.of((name, ref.spec) for name, ref in self.own).size

    @property
    def mostly_dead(self) -> bool:
        """Whether most of its bytes are not worth keeping."""
        return 2 * self.anew < self.size

    @property
    def stays(self) -> int:
        """The bytes that it takes when it is kept, written anew if it is mostly dead."""
        return self.anew if self.mostly_dead else self.size


@dataclass(frozen=True)
class GcPlan:
    """What is deleted, and what is written anew without its dead tensors. `rooted`, `stays`: bytes of packs."""

    delete: tuple[Doomed, ...]
    repack: tuple[Pack, ...]
    rooted: int
    stays: int

    @property
    def freed(self) -> int:
        """The bytes that the disk has more afterwards."""
        return sum(doomed.freed for doomed in self.delete) + sum(p.freed - p.anew for p in self.repack if p.freed)


@dataclass(frozen=True, slots=True)
class Collected:
    """What was deleted: how many files of each kind, and bytes freed; and packs that were written anew."""

    files: int = 0
    freed: int = 0
    repacked: int = 0

    def plus(self, more: Collected, repacked: int) -> Collected:
        """Both together, with so many packs written anew in between."""
        return Collected(self.files + more.files, self.freed + more.freed, repacked)


def plan_gc(inside: Inside, policy: Policy) -> GcPlan:
    """What the policy lets go. Raises StoreError KB706 if what roots keep is not known."""
    keep = kept(inside)
    packs = _unrooted(inside, keep)
    go = [pack for pack in packs if not pack.own or policy.expired(pack.used)]
    left = [pack for pack in packs if pack not in go]
    rooted = sum(_size(inside.paths.pack(digest)) for digest in keep.packs)
    if policy.max_size is not None:
        # The cheapest first, by seconds for each byte that it takes; among equals the one that was used longest ago.
        left.sort(key=lambda pack: (pack.seconds / max(pack.stays, 1), pack.used, pack.digest))
        while left and rooted + sum(pack.stays for pack in left) > policy.max_size:
            go.append(left.pop(0))
    doomed = [Doomed("pack", pack.path, pack.digest, pack.freed, pack.seconds) for pack in sorted(go, key=_by_digest)]
    doomed += _small_files(inside, keep, policy)
    doomed += _leftovers(inside, policy)
    repacked = tuple(pack for pack in sorted(left, key=_by_digest) if pack.mostly_dead)
    return GcPlan(tuple(doomed), repacked, rooted, sum(pack.stays for pack in left))


def collect(inside: Inside, plan: GcPlan) -> Collected:
    """Delete what the plan lists. Nobody else may have the store open; and it may be cut short anywhere."""
    packs = [doomed for doomed in plan.delete if doomed.kind == "pack" and doomed.digest is not None]
    gone = {doomed.path for doomed in plan.delete}
    # Before anything is forgotten, so that at no moment a tensor seems lost that lies elsewhere too.
    inside.packs.locate_again(inside.facts.located_in_any(gone), but_not=gone)
    inside.facts.forget_located_in(gone)
    inside.packs.forget(doomed.digest for doomed in packs if doomed.digest)
    inside.content.forget([doomed.digest for doomed in plan.delete if doomed.kind == "manifest" and doomed.digest])
    inside.packs.sync()
    folders = set()
    for doomed in plan.delete:
        if doomed.kind == "folder":
            inside.disk.rmtree(doomed.path)
        else:
            inside.disk.unlink(doomed.path)
        folders.add(os.path.dirname(doomed.path))
    for folder in sorted(folders):
        inside.disk.sync_dir(folder)
    return Collected(len(plan.delete), sum(doomed.freed for doomed in plan.delete))


def repack(inside: Inside, plan: GcPlan) -> int:
    """Write what is worth keeping of mostly dead packs into new ones; the answer is how many. A full disk ends it."""
    done = 0
    for pack in plan.repack:
        try:
            _write_anew(inside, pack)
            done += 1
        except DamagedTensor:  # for `check` to find
            continue
        except StoreError as error:
            if error.code != FULL:
                raise
            break
    return done


def _write_anew(inside: Inside, pack: Pack) -> None:
    layout, _ = named_pack(pack.path, pack.digest)
    checksums = inside.facts.checksums(ref.digest for _, ref in pack.own)
    with inside.write_pack((name, ref.spec) for name, ref in pack.own) as writer:
        try:
            for name, ref in pack.own:
                entry = Finished(name, ref, checksums.get(ref.digest), None)
                writer.copy(name, ref, place(pack.path, layout, entry))
            writer.finish()
        except StoreError:
            writer.discard()
            raise


def _unrooted(inside: Inside, keep: Kept) -> list[Pack]:
    """The packs that no root keeps, the last used first: of two that hold a tensor, the first owns it."""
    found = []
    for digest, path in stored_digests(inside.paths.packs, ".safetensors"):
        if digest not in keep.packs:
            with suppress(FileNotFoundError):  # another process has just set it aside
                stat = os.stat(path)
                found.append((-inside.packs.used(digest, path), digest, path, stat))
    seen, packs = set(keep.tensors), []
    for used, digest, path, stat in sorted(found, key=lambda pack: pack[:2]):
        own = tuple((name, ref) for name, ref in _tensors(path, digest) if ref.spec.nbytes and ref.digest not in seen)
        seen |= {ref.digest for _, ref in own}
        costs = inside.facts.costs(ref.digest for _, ref in own)
        seconds = sum(costs.get(ref.digest, USUAL * ref.spec.nbytes) for _, ref in own)
        freed = stat.st_size if stat.st_nlink == 1 else 0
        packs.append(Pack(digest, path, stat.st_size, freed, -used, own, seconds))
    return packs


def _tensors(path: str, digest: Digest) -> Iterable[tuple[str, TensorRef]]:
    try:
        return named_pack(path, digest)[1].items()
    except (StoreError, FileNotFoundError):  # damaged: nothing in it is worth keeping
        return ()


def _small_files(inside: Inside, keep: Kept, policy: Policy) -> Iterator[Doomed]:
    """Manifests and companion files. They take little room, so they go by age only."""
    kinds = (
        ("manifest", inside.paths.manifests, ".json", keep.manifests),
        ("file", inside.paths.files, "", keep.files),
    )
    for kind, folder, suffix, kept_here in kinds:
        for digest, path in stored_digests(folder, suffix):
            if digest not in kept_here and policy.expired(_time(path)):
                yield Doomed(kind, path, digest, _size(path))


def _leftovers(inside: Inside, policy: Policy) -> Iterator[Doomed]:
    """What interrupted processes left: unfinished packs after a day, and all that nobody will ever look for."""
    stays = UNFINISHED_STAYS if policy.older_than is None else policy.older_than
    for name in sorted(os.listdir(inside.paths.tmp)):
        path = os.path.join(inside.paths.tmp, name)
        if os.path.isdir(path):
            yield Doomed("folder", path, None, sum(_size(os.path.join(path, file)) for file in os.listdir(path)))
        elif name.endswith(PART) and _time(path) < policy.now - stays:
            journal = path.removesuffix(PART) + JOURNAL
            yield Doomed("unfinished", path, None, _size(path))
            if os.path.exists(journal):
                yield Doomed("journal", journal, None, _size(journal))
        elif not name.endswith((PART, JOURNAL)):
            yield Doomed("leftover", path, None, _size(path))
    for folder, _, names in os.walk(inside.paths.root):
        for name in sorted(names):
            if name.startswith(".") and name.endswith(TEMPORARY) and folder != inside.paths.tmp:
                yield Doomed("leftover", os.path.join(folder, name), None, _size(os.path.join(folder, name)))


def _by_digest(pack: Pack) -> Digest:
    return pack.digest


def _size(path: str) -> int:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return 0
    return stat.st_blocks * 512 if path.endswith(PART) else stat.st_size


def _time(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return float("inf")
