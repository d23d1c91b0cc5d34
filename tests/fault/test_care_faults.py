"""Fail, cut or kill at each file operation of gc, repair and migrate: the store stays sound, the next try finishes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kittybuild.errors import StoreError
from kittybuild.store.disk import Disk
from kittybuild.store.gc import Policy
from kittybuild.store.layout import Layout, stored_digests
from kittybuild.store.pack import read_pack_header
from kittybuild.store.store import Store
from kittybuild.tensors import DType
from tests.building import contents
from tests.conftest import Counted
from tests.faults import (
    SMALL_FILE,
    THREE,
    Fault,
    FaultyDisk,
    Killed,
    PowerCutDisk,
    Sample,
    UnsyncedDisk,
    assert_sound,
    fill,
    manifest_of,
    put_pack,
    quick_folder,
    sample,
)

BLOCKS = [sample(f"b{n}", DType.U8, (8192,)) for n in range(5)]
NEEDED = [s.ref.digest for s in (*THREE, *BLOCKS[:2])]
HALVES = ("pwrite", "append", "copy_range")
Operation = Callable[[str, Disk], None]


def furnish(root: str, disk: Disk) -> None:
    """Two outputs of two projects; a pack that nobody needs, a mostly dead one, an interrupted one, other rubbish."""
    with Store.open(root, disk=disk) as store:
        for folder, samples in (("/a/out", THREE), ("/b/out", tuple(BLOCKS[:2]))):
            pack = put_pack(store, samples)
            store.put_file(SMALL_FILE)
            store.set_root("calm", folder, store.put_manifest(manifest_of(pack, samples)))
        loose = put_pack(store, BLOCKS[2:3])
        store.put_manifest(manifest_of(loose, BLOCKS[2:3]))
        mixed = put_pack(store, [*BLOCKS[:2], BLOCKS[3], *THREE])
        store.set_costs({BLOCKS[2].ref.digest: 1e-6, BLOCKS[3].ref.digest: 60.0})
        with store.write_pack((s.name, s.spec) for s in BLOCKS[3:]) as writer:
            fill(writer, BLOCKS[4:])
        assert mixed.digest != loose.digest


def neglect(root: str) -> None:
    """What time does: the interrupted pack grows old, and a temporary file and a moved index lie about."""
    for name in os.listdir(f"{root}/tmp"):
        os.utime(f"{root}/tmp/{name}", (0, 0))
    os.makedirs(f"{root}/tmp/damaged-index-0")
    Path(root, "files/.0.tmp").write_bytes(b"cut")


def gc(root: str, disk: Disk) -> None:
    with Store.open(root, disk=disk, to_clean=True) as store:
        rooted = store.plan_gc(Policy()).rooted
        store.collect(Policy(max_size=rooted + 13_000))


def repair(root: str, disk: Disk) -> None:
    with Store.open(root, disk=disk, to_clean=True) as store:
        store.repair()


def migrate(root: str, disk: Disk) -> None:
    Store.open(root, disk=disk).close()


def damage(root: str) -> None:
    """In a rooted pack whose tensors lie in another one too, and in a companion file that nobody needs."""
    with Store.open(root, disk=UnsyncedDisk()) as store:
        for path in (store.location(THREE[0].ref.digest), store.file(store.put_file(b"of no use"))):
            name = path if isinstance(path, str) else path.path if path else ""
            os.chmod(name, 0o600)
            with open(name, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xff")


def older(root: str) -> None:
    Path(root, "FORMAT").write_bytes(b"kittybuild-store 1\n")
    os.unlink(f"{root}/reserve")


OPERATIONS: dict[str, tuple[Operation, Callable[[str], None]]] = {
    "gc": (gc, neglect),
    "repair": (repair, damage),
    "migrate": (migrate, older),
}


class Before:
    """The store that an operation begins with, and what it makes of it undisturbed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.kept, self.root = name, folder / f"{name}-kept", str(folder / name)
        self.operation, prepare = OPERATIONS[name]
        furnish(str(self.kept), UnsyncedDisk())
        prepare(str(self.kept))
        disk = FaultyDisk()
        self.operation(self.again(), disk)
        self.calls, self.after = disk.calls, self.state()

    def again(self) -> str:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.kept, self.root)
        return self.root

    def state(self) -> dict[str, bytes]:
        """All that the store holds, but for what only saves time."""
        found = contents(self.root)
        return {name: data for name, data in found.items() if not name.startswith(("index", "locks", "tmp", "."))}

    def assert_recovers(self, what: str) -> None:
        assert_needed(self.root)
        self.operation(self.root, UnsyncedDisk())
        if self.name == "repair":  # a pack that is gone is only made again if an output needs it
            assert self.state().items() <= self.after.items(), what
        else:
            assert self.state() == self.after, what
        assert_needed(self.root)


def assert_needed(root: str) -> None:
    """Nothing that a root needs is lost, and all that is there is what it says (what was damaged before, aside)."""
    if root.endswith("repair"):
        with Store.open(root, disk=UnsyncedDisk()) as store:
            store.repair()
    assert_sound(root, NEEDED)
    with Store.open(root, disk=UnsyncedDisk()) as store:
        assert len(store.roots()) == 2
        assert set(store.locations(NEEDED)) == set(NEEDED)
        keys = {s.key: s.ref for s in (*THREE, *BLOCKS[:4])}
        assert store.realisations(keys) == keys


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.fixture(scope="module", params=sorted(OPERATIONS))
def before(request: pytest.FixtureRequest, folder: Path) -> Before:
    return Before(folder, request.param)


def test_the_operations_do_what_they_should(before: Before) -> None:
    with Store.open(before.again(), disk=UnsyncedDisk()) as store:
        paths = Layout(store.root)
        packs = {digest for digest, _ in stored_digests(paths.packs, ".safetensors")}
    before.operation(before.root, UnsyncedDisk())
    left = {digest for digest, _ in stored_digests(paths.packs, ".safetensors")}
    if before.name == "gc":
        assert (len(packs), len(packs & left), len(left)) == (4, 2, 3)
        assert os.listdir(paths.tmp) == []
        assert len(before.calls) > 40
    elif before.name == "repair":
        assert packs == left
        assert len(before.calls) > 20
    else:
        assert Path(paths.format).read_bytes() == b"kittybuild-store 2\n"
    assert os.path.exists(paths.reserve)


@pytest.mark.parametrize("fault", [Fault.KILL, Fault.TORN])
def test_killed_at_any_operation(fault: Fault, before: Before, counted: Counted) -> None:
    faults = 0
    for n, name in enumerate(before.calls):
        if fault is Fault.TORN and name not in HALVES:
            continue
        disk = FaultyDisk(n, fault)
        with suppress(StoreError), pytest.raises(Killed):
            before.operation(before.again(), disk)
        assert disk.dead
        disk.bury()
        before.assert_recovers(f"{fault} at {n}: {name}")
        faults += 1
    counted(before.name, len(before.calls), faults)


def error_of(operation: Operation, root: str, disk: Disk) -> StoreError | None:
    """What an operation ends with."""
    try:
        operation(root, disk)
    except StoreError as error:
        return error
    return None


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC, Fault.SHORT])
def test_a_failure_at_any_operation_is_an_error_of_the_store(fault: Fault, before: Before, counted: Counted) -> None:
    code, faults = "KB704" if fault is Fault.ENOSPC else "KB705", 0
    for n, name in enumerate(before.calls):
        if fault is Fault.SHORT and name not in HALVES:
            continue
        disk = FaultyDisk(n, fault)
        error = error_of(before.operation, before.again(), disk)
        if error is None:  # a full disk ends the writing anew, and the reserve may wait for room; the rest is done
            assert fault is Fault.ENOSPC, f"{n}: {name}"
        else:
            assert (error.code, bool(error.at), bool(error.hint)) == (code, True, True), f"{n}: {name}: {error}"
        disk.bury()
        before.assert_recovers(f"{fault} at {n}: {name}")
        faults += 1
    counted(before.name, len(before.calls), faults)


def holds(path: str, samples: tuple[Sample, ...]) -> bool:
    """Whether a pack is of just these tensors."""
    return set(read_pack_header(path)[1].values()) == {s.ref for s in samples}


@pytest.mark.parametrize("keep_names", [False, True])
@pytest.mark.parametrize("keep_index", [False, True])
@pytest.mark.parametrize("name", ["gc", "repair"])
def test_a_power_cut_loses_nothing_that_roots_need(name: str, keep_names: bool, keep_index: bool, folder: Path) -> None:
    base = folder / f"power-{name}-{keep_names}-{keep_index}"
    disk = PowerCutDisk(str(base / "store"))
    os.makedirs(disk.root)
    furnish(disk.root, disk)
    if name == "repair":
        os.unlink(next(path for _, path in stored_digests(f"{disk.root}/packs", ".safetensors") if holds(path, THREE)))
    cuts: list[str] = []

    def cut(disk: PowerCutDisk) -> None:
        target = str(base / f"cut{len(cuts)}-{name}")
        disk.cut(target, keep_names=keep_names, keep_index=keep_index)
        cuts.append(target)

    disk.at = cut
    OPERATIONS[name][0](disk.root, disk)
    assert len(cuts) > 5
    for target in cuts:
        if name == "repair":
            repair(target, UnsyncedDisk())
        assert_sound(target, NEEDED)
        with Store.open(target, disk=UnsyncedDisk()) as store:
            assert len(store.roots()) == 2
            assert set(store.locations(NEEDED)) == set(NEEDED)


def test_a_full_disk_can_be_cleaned(before: Before) -> None:
    """Nothing can be made until something was deleted: the reserve first."""
    if before.name != "gc":
        pytest.skip("only gc makes room")

    class Full(UnsyncedDisk):
        room = 0

        def unlink(self, path: str) -> None:
            self.room += os.path.getsize(path) if os.path.exists(path) else 0
            super().unlink(path)

        def create(self, path: str, size: int = 0) -> int:
            if self.room <= size:
                raise OSError(28, "No space left on device")
            self.room -= size
            return super().create(path, size)

    with Store.open(before.again(), disk=Full(), to_clean=True) as store:
        store.collect(Policy())
    assert_needed(before.root)
