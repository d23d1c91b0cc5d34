"""Disks that fail on purpose, and what must be true of a store whatever happened to it.

For each n in the number of calls of a build: die at that call (`FaultyDisk(n, Fault.KILL)`), do what the kernel does
for a process that died (`bury`), `assert_sound`, and `build` again with the real disk.
"""

from __future__ import annotations

import errno
import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from kittybuild.digest import Digest, tagged
from kittybuild.model.manifest import Manifest, ManifestFile, ManifestShard, ManifestTensor
from kittybuild.store.disk import Disk
from kittybuild.store.layout import Layout, stored_digests
from kittybuild.store.pack import read_pack_header
from kittybuild.store.store import FinishedPack, PackWriter, Store
from kittybuild.tensors import DType, TensorRef, TensorSpec

OPERATIONS = tuple(name for name in vars(Disk) if not name.startswith("_"))
OPENING = ("create", "open_append", "open_update", "open_lock")


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A temporary folder, in memory where that can be: SQLite syncs, and a test of faults builds hundreds of times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)


class Killed(BaseException):
    """The process is dead: no clean-up code of its own may do anything any more."""


class Fault(Enum):
    """What happens at the chosen call."""

    EIO = auto()
    ENOSPC = auto()
    SHORT = auto()  # half of the data are written, then EIO
    KILL = auto()
    TORN = auto()  # half of the data are written, then killed
    EXIT = auto()  # the real end of the process, without any clean-up: only in a child process


class FaultyDisk(Disk):
    """The real disk, but the n-th call (from 0) meets a fault; nested calls count too. n < 0: none, only counting.

    After a kill every call raises Killed. ENOSPC stays: a full disk is full for every later call that needs room.
    """

    def __init__(self, n: int = -1, fault: Fault = Fault.EIO) -> None:
        self.n = n
        self.fault = fault
        self.calls: list[str] = []
        self.dead = False
        self.full = False
        self._open: dict[int, str] = {}
        self._counting = threading.Lock()

    def bury(self) -> None:
        """Close all that the dead process had open, and so free its locks."""
        for fd in list(self._open):
            with suppress(OSError):
                os.close(fd)
        self._open.clear()

    def _meet(self, name: str, args: tuple[Any, ...]) -> None:
        if self.dead:
            raise Killed
        if self.full and name in ("create", "pwrite", "append", "copy_range", "makedirs"):
            raise OSError(errno.ENOSPC, "No space left on device")
        with self._counting:
            self.calls.append(name)
            met = len(self.calls) - 1 == self.n
        if not met:
            return
        if self.fault in (Fault.SHORT, Fault.TORN):
            self._half(name, args)
        if self.fault is Fault.EXIT:
            os._exit(9)
        if self.fault in (Fault.KILL, Fault.TORN):
            self.dead = True
            raise Killed
        self.full = self.fault is Fault.ENOSPC
        code = errno.ENOSPC if self.full else errno.EIO
        raise OSError(code, os.strerror(code))

    def _half(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "pwrite":
            fd, data, offset = args
            os.pwrite(fd, bytes(data)[: len(data) // 2], offset)
        elif name == "append":
            os.write(args[0], bytes(args[1])[: len(args[1]) // 2])
        elif name == "copy_range":
            source, start, fd, offset, nbytes = args
            os.pwrite(fd, os.pread(source, nbytes // 2, start), offset)


def _counted(name: str) -> Callable[..., Any]:
    real = getattr(Disk, name)

    @functools.wraps(real)
    def call(self: FaultyDisk, *args: Any, **kwargs: Any) -> Any:
        self._meet(name, args)
        result = real(self, *args, **kwargs)
        if name in OPENING:
            self._open[result] = args[0]
        elif name == "close":
            self._open.pop(args[0], None)
        return result

    return call


for _name in OPERATIONS:
    setattr(FaultyDisk, _name, _counted(_name))


class PowerCutDisk(Disk):
    """The real disk, and a memory of what a power cut at this moment would leave.

    Only what was synced is sure. `cut` writes what is left into a new folder: of each file the bytes of its last sync
    (without one, zeros); of each folder, with `keep_names`, the names as they are now, else those of its last sync.
    SQLite writes the index without us: of it, with `keep_index`, what there was when its log was last synced.
    """

    def __init__(self, root: str, at: Callable[[PowerCutDisk], None] | None = None) -> None:
        self.root = root
        self.at = at
        self._contents: dict[int, bytes] = {}
        self._names: dict[str, dict[str, int]] = {}
        self._index: dict[str, bytes] = {}

    def create(self, path: str, size: int = 0) -> int:
        fd = super().create(path, size)
        self._contents.pop(os.fstat(fd).st_ino, None)
        return fd

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self._contents[os.fstat(fd).st_ino] = os.pread(fd, os.fstat(fd).st_size, 0)
        self._passed()

    def sync_dir(self, path: str) -> None:
        super().sync_dir(path)
        self._names[os.path.abspath(path)] = _listed(path)
        if os.path.basename(path) == "index":
            names = [name for name in _listed(path) if not name.endswith("-shm")]
            self._index = {name: _bytes(os.path.join(path, name)) for name in names}
        self._passed()

    def rename(self, src: str, dst: str) -> None:
        super().rename(src, dst)
        self._passed()

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self._passed()

    def cut(self, target: str, *, keep_names: bool, keep_index: bool = False) -> None:
        """Write what a power cut would leave to `target`."""
        os.makedirs(target)
        self._survive(self.root, target, keep_names)
        for name, data in self._index.items() if keep_index else ():
            os.makedirs(f"{target}/index", exist_ok=True)
            with open(f"{target}/index/{name}", "wb") as file:
                file.write(data)

    def _survive(self, folder: str, target: str, keep_names: bool) -> None:
        now = _listed(folder)
        for name, inode in (now if keep_names else self._names.get(folder, {})).items():
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                if name != "index":
                    os.mkdir(os.path.join(target, name))
                    self._survive(path, os.path.join(target, name), keep_names)
            else:
                size = os.stat(path).st_size if now.get(name) == inode else 0
                with open(os.path.join(target, name), "wb") as file:
                    file.write(self._contents.get(inode, bytes(size)))

    def _passed(self) -> None:
        if self.at is not None:
            self.at(self)


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _listed(folder: str) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries}


class UnsyncedDisk(Disk):
    """The real disk without its syncs, for tests that are not about them."""

    def fsync(self, fd: int) -> None:
        pass

    def sync_dir(self, path: str) -> None:
        pass


@dataclass(frozen=True)
class Sample:
    """A tensor with its bytes."""

    name: str
    spec: TensorSpec
    data: bytes

    @property
    def ref(self) -> TensorRef:
        return TensorRef(Digest.of(self.data), self.spec)

    @property
    def key(self) -> Digest:
        return tagged("kittybuild.test.key", [self.name, self.ref.to_json()])


def sample(name: str, dtype: DType = DType.F32, shape: tuple[int, ...] = (5,)) -> Sample:
    """A tensor whose bytes follow from its name."""
    spec = TensorSpec(dtype, shape)
    data = b"".join(tagged(name, block).hex.encode() for block in range(-(-spec.nbytes // 64)))
    return Sample(name, spec, data[: spec.nbytes])


THREE = (sample("odd"), sample("whole", DType.BF16, (2, 2048)), sample("scalar", DType.F16, ()))
SMALL_FILE = b'{"model_type": "pico"}'


def fill(writer: PackWriter, samples: Iterable[Sample]) -> None:
    """Write the tensors, in two pieces each, and call them done."""
    for s in samples:
        half = len(s.data) // 2
        writer.write(s.name, half, s.data[half:])
        writer.write(s.name, 0, s.data[:half])
        writer.done(s.name, s.ref, xxh3_64_hexdigest(s.data), s.key)


def put_pack(store: Store, samples: Iterable[Sample]) -> FinishedPack:
    """Write a pack."""
    samples = tuple(samples)
    with store.write_pack((s.name, s.spec) for s in samples) as writer:
        fill(writer, samples)
        return writer.finish()


def manifest_of(pack: FinishedPack, samples: Iterable[Sample]) -> Manifest:
    """The manifest of a checkpoint of that one shard and one companion file."""
    samples = tuple(samples)
    tensors = tuple(ManifestTensor(s.name, s.ref, s.key) for s in samples)
    shard = ManifestShard(pack.digest, pack.size, tuple(s.name for s in samples))
    config = ManifestFile("config.json", Digest.of(SMALL_FILE), len(SMALL_FILE))
    return Manifest(tensors, (shard,), (config,))


def build(root: str, disk: Disk, reached: list[str] | None = None, samples: tuple[Sample, ...] = THREE) -> Digest:
    """A whole build: open, salvage, a pack (copying what is there), a file, a manifest, a root. The pack's digest.

    `reached` is told of each step whose result must survive everything from then on.
    """
    reached = [] if reached is None else reached
    with Store.open(root, disk=disk) as store:
        store.salvage()
        with store.write_pack((s.name, s.spec) for s in samples) as writer:
            for s in samples:
                location = store.location(s.ref.digest)
                if location is not None:
                    writer.copy(s.name, s.ref, location, s.key)
                else:
                    fill(writer, [s])
                writer.flush()
            pack = writer.finish()
        reached.append("pack")
        store.put_file(SMALL_FILE)
        manifest = store.put_manifest(manifest_of(pack, samples))
        reached.append("manifest")
        store.set_shortcut(samples[0].key, manifest)
        store.set_root("calm", "/models/calm", manifest)
        reached.append("root")
        store.drop_salvaged()
    return pack.digest


def assert_sound(root: str, digests: Iterable[Digest] = ()) -> None:
    """Open the store and see that no name in it holds other bytes than it says; `digests` are tensors to look for."""
    with Store.open(root) as store:
        paths = Layout(store.root)
        for digest, path in stored_digests(paths.packs, ".safetensors"):
            layout, refs = read_pack_header(path)
            assert layout.digest(refs) == digest
            for name, ref in refs.items():
                assert _digest_at(path, layout.offset(name), ref.spec.nbytes) == ref.digest
        for digest, path in (*stored_digests(paths.manifests, ".json"), *stored_digests(paths.files)):
            assert Digest.of(_bytes(path)) == digest
        for digest, location in store.locations(digests).items():
            assert _digest_at(location.path, location.offset, location.nbytes) == digest
        for kept in store.roots():
            manifest = store.manifest(kept.manifest)
            assert manifest is not None
            assert all(store.pack(shard.pack) for shard in manifest.shards)
            assert all(store.read_file(file.digest) is not None for file in manifest.files)


def _digest_at(path: str, offset: int, nbytes: int) -> Digest:
    with open(path, "rb") as file:
        return Digest.of(os.pread(file.fileno(), nbytes, offset))
