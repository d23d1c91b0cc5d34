"""Writing a pack: data first, then its line in the journal; at the end header, sync, rename, and only then the index.

Until the rename the file lies in `tmp/`, locked. A writer that dies leaves file and journal there, to be salvaged.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from kittybuild.digest import Digest
from kittybuild.store.disk import Disk
from kittybuild.store.facts import Facts, Location
from kittybuild.store.journal import Finished, first_line
from kittybuild.store.layout import JOURNAL, PART, TEMPORARY, Layout
from kittybuild.store.locks import held, try_lock
from kittybuild.store.pack import PackLayout
from kittybuild.store.packs import Packs, place
from kittybuild.store.problems import DamagedTensor, guarded, locked
from kittybuild.store.reading import digests, quick_digest
from kittybuild.tensors import TensorRef

_READ_ONLY = 0o444
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
PATIENCE = 600.0


@dataclass(frozen=True, slots=True)
class FinishedPack:
    """A pack in its place."""

    digest: Digest
    path: str
    size: int


@dataclass(frozen=True)
class Part:
    """An unfinished pack: an open, locked file in `tmp/`. `finished` are its tensors whose bytes were verified."""

    path: str
    fd: int
    layout: PackLayout
    finished: Mapping[str, Finished] = field(default_factory=dict)

    @property
    def journal(self) -> str:
        """The path of its journal."""
        return self.path.removesuffix(PART) + JOURNAL

    @classmethod
    def new(cls, disk: Disk, paths: Layout, layout: PackLayout) -> Part:
        """Make the file in its full size, and its journal."""
        part = cls(os.path.join(paths.tmp, os.urandom(16).hex() + PART), -1, layout)
        # Whoever looks for files without a writer waits for this lock, so that none is seen before it is locked itself.
        shared = held(disk, paths.lock("tmp"), exclusive=False, patience=PATIENCE)
        with guarded("make a pack", part.path, layout.size), shared:
            fd = disk.create(part.path, layout.size)
            try:
                if not try_lock(fd, exclusive=True):
                    raise locked(part.path, 0)
                disk.write_file(part.journal, first_line(layout.tensors), mode=0o600)
            except Exception:
                disk.close(fd)
                disk.unlink(part.path)
                raise
        return cls(part.path, fd, layout)


class PackWriter:
    """One pack in the making. Any thread may write; `finish` or `abandon` it once."""

    def __init__(
        self, disk: Disk, paths: Layout, packs: Packs, facts: Facts, part: Part, retire: Callable[[Part], None]
    ) -> None:
        self.layout = part.layout
        self._disk = disk
        self._paths = paths
        self._packs = packs
        self._facts = facts
        self._part = part
        self._retire = retire
        self._verified = {name: entry.ref.digest for name, entry in part.finished.items()}
        self._done: dict[str, Finished] = {}
        self._state = threading.Condition()
        self._users = 0
        self._closed = self._told = False
        self._sync_failed = False
        with guarded("open the journal of", part.path):
            self._journal_fd = disk.open_append(part.journal)

    def place(self, name: str) -> tuple[str, int]:
        """The file and the offset at which somebody else may write the bytes of a tensor, and then call `done`."""
        self._verified.pop(name, None)
        return self._part.path, self.layout.offset(name)

    def write(self, name: str, offset: int, data: Any) -> None:
        """Write contiguous `data` at `offset` from the first byte of the tensor."""
        view = memoryview(data).cast("B")
        if offset < 0 or offset + view.nbytes > self.layout.spec(name).nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + view.nbytes} are not all inside the tensor")
        self._verified.pop(name, None)
        with guarded("write", self._part.path, view.nbytes), self._using() as fd:
            self._disk.pwrite(fd, view, self.layout.offset(name) + offset)

    def copy(self, name: str, ref: TensorRef, location: Location, key: Digest | None = None) -> None:
        """Copy a tensor from where it lies, verify what arrived, and call it done.

        Raises DamagedTensor if `location` has other bytes or none; then the tensor can still be written or copied.
        """
        self._check(name, ref)
        xxh3 = location.xxh3
        if self._verified.get(name) != ref.digest:
            xxh3 = self._copy(name, ref, location)
        elif xxh3 is None:
            xxh3 = self._part.finished[name].xxh3
        self.done(name, ref, xxh3, key)

    def done(self, name: str, ref: TensorRef, xxh3: str | None, key: Digest | None) -> None:
        """Say that all bytes of a tensor are written."""
        self._check(name, ref)
        entry = Finished(name, ref, xxh3, key)
        with guarded("write", self._part.journal), self._using(), self._state:
            self._disk.append(self._journal_fd, entry.line())
            self._done[name] = entry

    def announce(self, name: str, memos: Mapping[tuple[Digest, str], Digest]) -> None:
        """Let others use a tensor that is done before the pack is; `memos`: source tensors that it was made of."""
        entry = self._done[name]
        self._told = True
        self._facts.announce({entry.ref.digest: place(self._part.path, self.layout, entry)}, memos)

    def flush(self) -> None:
        """Begin to write the data so far out, so that `finish` has little to wait for. Closed is fine."""
        with guarded("sync", self._part.path):
            with self._state:
                if self._closed:
                    return
                self._users += 1
            try:
                self._disk.start_writing(self._part.fd)
            finally:
                self._leave()

    def finish(self) -> FinishedPack:
        """Put the complete pack in its place and record its tensors; if it is there already, drop this one."""
        missing = [name for name, _ in self.layout.tensors if name not in self._done]
        if missing:
            raise ValueError(f"{len(missing)} tensors are not done, the first is {missing[0]!r}")
        refs = {name: entry.ref for name, entry in self._done.items()}
        digest = self.layout.digest(refs)
        path = self._paths.pack(digest)
        if self._packs.path(digest) is None:
            self._install(path, refs)
        with guarded("record", path):
            self._packs.record(digest, self.layout, self._done.values())
        with guarded("tidy up after", self._part.path):
            self._leave_part()
        # The journal goes last: without its file it still tells salvage which derivations made the tensors.
        self._facts.realise({entry.key: entry.ref for entry in self._done.values() if entry.key is not None})
        self._packs.sync()
        with guarded("tidy up after", self._part.path):
            self._disk.unlink(self._part.journal)
        return FinishedPack(digest, path, self.layout.size)

    def abandon(self) -> None:
        """Stop, and leave what is finished to be salvaged. Twice is fine, and so is after `finish`."""
        with guarded("close", self._part.path):
            self._close()

    def discard(self) -> None:
        """Stop, and delete what was written."""
        with guarded("delete", self._part.path):
            self._disk.unlink(self._part.path)
            self._disk.unlink(self._part.journal)
            self._close()

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def _check(self, name: str, ref: TensorRef) -> None:
        if self.layout.spec(name) != ref.spec:
            raise ValueError(f"{name}: {ref.spec} does not fit the pack's {self.layout.spec(name)}")

    def _copy(self, name: str, ref: TensorRef, location: Location) -> str:
        with guarded("write", self._part.path, ref.spec.nbytes), self._using() as fd, _source(location, ref) as source:
            start = self.layout.offset(name)
            try:
                self._disk.copy_range(source, location.offset, fd, start, location.nbytes)
            except OSError as error:
                if not _readable(source, location):
                    raise DamagedTensor(location.path, f"cannot be read: {error.strerror or error}") from error
                raise
            if location.xxh3 is not None:
                xxh3 = quick_digest(fd, start, location.nbytes)
                right = xxh3 == location.xxh3
            else:
                strong, xxh3 = digests(fd, start, location.nbytes)
                right = strong == ref.digest
        if not right:
            raise DamagedTensor(location.path, f"the bytes at {location.offset:,} are not tensor {ref.digest}")
        return xxh3

    def _install(self, path: str, refs: Mapping[str, TensorRef]) -> None:
        with guarded("finish", self._part.path, self.layout.header_size), self._using() as fd:
            self._disk.pwrite(fd, self.layout.header(refs), 0)
            self._sync()
            self._disk.chmod(self._part.path, _READ_ONLY)
            self._disk.makedirs(os.path.dirname(path))
            self._name(path)
            self._disk.sync_dir(os.path.dirname(path))

    def _name(self, path: str) -> None:
        if (
            self._part.finished or self._told
        ):  # others may have been told that tensors lie there: the old name stays too
            # Linked beside its place, then renamed: another process may just be putting the same pack there.
            beside = f"{self._part.path}{TEMPORARY}"
            try:
                self._disk.link(self._part.path, beside)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
            else:
                self._disk.rename(beside, path)
                self._disk.unlink(beside)  # still there if both are names of one file already
                return
        self._disk.rename(self._part.path, path)

    def _leave_part(self) -> None:
        if self._part.finished:
            self._close(keep_part=True)
            self._retire(self._part)
        else:
            self._disk.unlink(self._part.path)
            self._close()

    def _sync(self) -> None:
        # After a failed sync the system may call the next one good although the data are lost: so it stays failed.
        if self._sync_failed:
            raise OSError(errno.EIO, "an earlier sync failed")
        try:
            self._disk.fsync(self._part.fd)
        except OSError:
            self._sync_failed = True
            raise

    @contextmanager
    def _using(self) -> Iterator[int]:
        """Hold the file open: closing it under a thread that writes could let that write hit another file."""
        with self._state:
            if self._closed:
                raise ValueError("the pack is closed")
            self._users += 1
        try:
            yield self._part.fd
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._state:
            self._users -= 1
            self._state.notify_all()

    def _close(self, *, keep_part: bool = False) -> None:
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._state.wait_for(lambda: self._users == 0)
        self._disk.close(self._journal_fd)
        if not keep_part:
            self._disk.close(self._part.fd)


@contextmanager
def _source(location: Location, ref: TensorRef) -> Iterator[int]:
    try:
        fd = os.open(location.path, os.O_RDONLY)
    except OSError as error:
        raise DamagedTensor(location.path, f"cannot be opened: {error.strerror}") from error
    try:
        if location.nbytes != ref.spec.nbytes or os.fstat(fd).st_size < location.offset + location.nbytes:
            raise DamagedTensor(location.path, f"too short to hold tensor {ref.digest}")
        yield fd
    finally:
        os.close(fd)


def _readable(fd: int, location: Location) -> bool:
    try:
        quick_digest(fd, location.offset, location.nbytes)
    except OSError:
        return False
    return True
