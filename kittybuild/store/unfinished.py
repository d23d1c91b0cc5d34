"""The files in `tmp/`: packs whose writer died, and packs that were found damaged. What is good in them is used.

Nothing that they claim is believed: the bytes of each tensor are verified by digest before it is adopted. An adopted
file stays locked while the store is open, so that no other process deletes or completes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kittybuild.digest import Digest
from kittybuild.errors import StoreError
from kittybuild.store.disk import Disk
from kittybuild.store.facts import Facts, Location
from kittybuild.store.journal import Finished, first_line, read_journal
from kittybuild.store.layout import JOURNAL, PART, TEMPORARY, Layout
from kittybuild.store.locks import held, try_lock
from kittybuild.store.pack import PackLayout, read_cut_pack_header
from kittybuild.store.packs import Packs, place
from kittybuild.store.problems import guarded
from kittybuild.store.reading import digests
from kittybuild.store.writer import PATIENCE, Part
from kittybuild.tensors import TensorRef


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What was found in unfinished packs: tensors that nothing else in the store holds, their bytes, and the files."""

    tensors: int
    bytes: int
    files: int


class Unfinished:
    """The unfinished and damaged packs of a store, and those that this process has adopted."""

    def __init__(self, disk: Disk, paths: Layout, packs: Packs, facts: Facts) -> None:
        self._disk = disk
        self._paths = paths
        self._packs = packs
        self._facts = facts
        self._adopted: dict[str, Part] = {}
        self._retired: list[Part] = []

    def salvage(self) -> Salvaged:
        """Adopt every file whose writer is gone; delete those with nothing that we do not have elsewhere."""
        with guarded("salvage", self._paths.tmp):
            with held(self._disk, self._paths.lock("tmp"), exclusive=True, patience=PATIENCE):
                names = sorted(os.listdir(self._paths.tmp))
                found = self._lock_orphans([name for name in names if name.endswith(PART)])
                self._clear_journals([name for name in names if name.endswith(JOURNAL)])
                for name in names:
                    if name.endswith(TEMPORARY):
                        self._disk.unlink(os.path.join(self._paths.tmp, name))
            counts = self._adopt_all(found)
        useful = [count for count in counts if count[0]]
        return Salvaged(sum(tensors for tensors, _ in useful), sum(size for _, size in useful), len(useful))

    def claims(self) -> tuple[dict[Digest, TensorRef], dict[Digest, Location]]:
        """What unfinished packs claim to hold: what derivations make, and where it lies. Nothing is read but journals,
        nothing is verified, and nothing changes."""
        made: dict[Digest, TensorRef] = {}
        places: dict[Digest, Location] = {}
        with guarded("read", self._paths.tmp):
            for name in sorted(os.listdir(self._paths.tmp)):
                path = os.path.join(self._paths.tmp, name)
                journal = read_journal(path.removesuffix(PART) + JOURNAL) if name.endswith(PART) else None
                layout, finished = journal or (PackLayout.of(()), {})
                places |= {entry.ref.digest: place(path, layout, entry) for entry in finished.values()}
                made |= {entry.key: entry.ref for entry in finished.values() if entry.key is not None}
        return made, places

    def drop(self) -> None:
        """Delete the adopted files: after a finished build, packs hold what was good in them."""
        with guarded("delete", self._paths.tmp):
            for path in sorted(self._adopted):
                self._delete(self._adopted.pop(path))
            self._drop_retired()

    def take(self, layout: PackLayout) -> Part | None:
        """An adopted file of that very layout, to be completed in place instead of copied; with a clean journal."""
        for path, part in sorted(self._adopted.items()):
            if part.layout == layout and _is_ours_to_write(part):
                lines = [first_line(layout.tensors), *(entry.line() for entry in part.finished.values())]
                shared = held(self._disk, self._paths.lock("tmp"), exclusive=False, patience=PATIENCE)
                with guarded("write", part.journal), shared:
                    self._disk.write_file(part.journal, b"".join(lines), mode=0o600)
                return self._adopted.pop(path)
        return None

    def retire(self, part: Part) -> None:
        """Take back a file that was completed. It keeps this name of two, for those who were told it, until `drop`."""
        self._retired.append(part)

    def discard(self, path: str) -> None:
        """Move a damaged pack out of the way, and adopt those of its tensors that are still good; absent is fine."""
        path = os.path.abspath(path)
        # Before anything is forgotten, so that at no moment a tensor seems lost that lies elsewhere too.
        self._packs.locate_again(self._facts.located_in(path), but_not=[path])
        self._facts.forget_located_in([path])
        aside = None
        with guarded("set aside", path):
            if path in self._adopted:
                aside = path, self._adopted.pop(path).fd
            elif os.path.dirname(os.path.dirname(path)) == self._paths.packs and os.path.exists(path):
                self._packs.forget([Digest(os.path.basename(path).partition(".")[0])])
                aside = self._set_aside(path)
            if aside is not None:
                self._adopt(*aside)

    def close(self) -> None:
        """Let go of the adopted files; they stay, and the next to salvage them finds the same."""
        self._drop_retired()
        while self._adopted:
            self._disk.close(self._adopted.popitem()[1].fd)

    def _drop_retired(self) -> None:
        while self._retired:
            part = self._retired.pop()
            self._disk.unlink(part.path)
            self._disk.close(part.fd)

    def _set_aside(self, path: str) -> tuple[str, int] | None:
        target = os.path.join(self._paths.tmp, f"damaged-{os.urandom(16).hex()}{PART}")
        with held(self._disk, self._paths.lock("tmp"), exclusive=False, patience=PATIENCE):
            self._disk.rename(path, target)
            self._disk.sync_dir(os.path.dirname(path))
            fd = self._disk.open_update(target)
            if try_lock(fd, exclusive=True):
                return target, fd
            self._disk.close(fd)  # its own writer is just finishing it, and will let go of it
            return None

    def _lock_orphans(self, names: list[str]) -> list[tuple[str, int]]:
        orphans = []
        for name in names:
            path = os.path.join(self._paths.tmp, name)
            try:
                fd = self._disk.open_update(path)
            except FileNotFoundError:  # completed since we listed the folder
                continue
            if try_lock(fd, exclusive=True) and _same_file(fd, path):
                orphans.append((path, fd))
            else:
                self._disk.close(fd)
        return orphans

    def _clear_journals(self, names: list[str]) -> None:
        """Delete journals without a file: those packs are complete, or they are gone."""
        for name in names:
            path = os.path.join(self._paths.tmp, name)
            if os.path.exists(path.removesuffix(JOURNAL) + PART):
                continue
            journal = read_journal(path)
            if journal is not None:
                held_here = self._facts.locations(entry.ref.digest for entry in journal[1].values())
                self._realise({n: entry for n, entry in journal[1].items() if entry.ref.digest in held_here})
            self._disk.unlink(path)

    def _adopt_all(self, found: list[tuple[str, int]]) -> list[tuple[int, int]]:
        counts = []
        while found:
            path, fd = found.pop(0)
            try:
                counts.append(self._adopt(path, fd))
            except BaseException:
                for _, left in ((path, fd), *found):
                    self._disk.close(left)
                raise
        return counts

    def _adopt(self, path: str, fd: int) -> tuple[int, int]:
        """Verify and record what is good in a file; the answer is how many tensors, and bytes, only it holds."""
        part = Part(path, fd, PackLayout.of(()))
        claims = read_journal(part.journal) or _header_claims(path)
        if claims is not None:
            layout, finished = claims
            seen = [_verified(fd, layout, entry) for entry in finished.values()]
            part = Part(path, fd, layout, {entry.name: entry for entry in seen if entry is not None})
        self._realise(part.finished)
        known = self._facts.locations(entry.ref.digest for entry in part.finished.values())
        elsewhere = {digest for digest, location in known.items() if location.path != path}
        mine = {entry.ref.digest: place(path, part.layout, entry) for entry in part.finished.values()}
        only = {digest: location for digest, location in mine.items() if digest not in elsewhere}
        if only:
            self._facts.set_locations(only)
            self._adopted[path] = part
        else:
            self._delete(part)
        return len(only), sum(location.nbytes for location in only.values())

    def _realise(self, finished: Mapping[str, Finished]) -> None:
        # What was known stays. That it differs was, or will be, said where the derivation is run.
        self._facts.add_realisations({entry.key: entry.ref for entry in finished.values() if entry.key is not None})

    def _delete(self, part: Part) -> None:
        known = self._facts.locations(entry.ref.digest for entry in part.finished.values())
        here = {digest for digest, location in known.items() if location.path == part.path}
        self._facts.forget_locations(here)
        self._packs.locate_again(here)
        self._disk.unlink(part.path)
        self._disk.unlink(part.journal)
        self._disk.close(part.fd)


def _header_claims(path: str) -> tuple[PackLayout, dict[str, Finished]] | None:
    """What the header of a damaged pack says it holds."""
    try:
        layout, refs, _ = read_cut_pack_header(path)
    except StoreError:
        return None
    return layout, {name: Finished(name, ref, None, None) for name, ref in refs.items()}


def _verified(fd: int, layout: PackLayout, entry: Finished) -> Finished | None:
    """The entry with its quick checksum if the file really holds that tensor."""
    try:
        strong, quick = digests(fd, layout.offset(entry.name), entry.ref.spec.nbytes)
    except OSError:  # a part of the disk that cannot be read
        return None
    return Finished(entry.name, entry.ref, quick, entry.key) if strong == entry.ref.digest else None


def _is_ours_to_write(part: Part) -> bool:
    """Not a pack that was found damaged: that may be the shard of an output too, which must not change."""
    stat = os.fstat(part.fd)
    return stat.st_size == part.layout.size and stat.st_nlink == 1 and bool(stat.st_mode & 0o200)


def _same_file(fd: int, path: str) -> bool:
    """Whether the open file still has that name: its writer may have put it in its place before we had the lock."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
