"""Fail, cut or kill at each file operation of a whole build: the store stays sound and the next build goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kittybuild.digest import Digest
from kittybuild.errors import StoreError
from kittybuild.store.disk import Disk
from kittybuild.store.pack import PackLayout
from kittybuild.store.store import FinishedPack, Store
from tests.conftest import Counted
from tests.faults import (
    THREE,
    Fault,
    FaultyDisk,
    Killed,
    PowerCutDisk,
    UnsyncedDisk,
    assert_sound,
    build,
    manifest_of,
    put_pack,
    quick_folder,
    sample,
)

DIGESTS = tuple(s.ref.digest for s in THREE)
PACK = PackLayout.of((s.name, s.spec) for s in THREE).digest({s.name: s.ref for s in THREE})
HALVES = ("pwrite", "append", "copy_range")
# With "odd" in another pack already, the build both copies and writes.
OTHER = (THREE[0], sample("other"))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.fixture(scope="module", params=["new", "used"])
def before(request: pytest.FixtureRequest, folder: Path) -> Path:
    """The store that a build begins with: none, or one that holds a tensor, an interrupted pack and a root."""
    root = folder / request.param / "store"
    if request.param == "used":
        with Store.open(str(root), disk=UnsyncedDisk()) as store:
            pack = put_pack(store, OTHER)
            store.put_file(b'{"model_type": "pico"}')
            store.set_root("other", "/models/other", store.put_manifest(manifest_of(pack, OTHER)))
            with store.write_pack((s.name, s.spec) for s in THREE) as writer:
                writer.write("whole", 0, THREE[1].data)
                writer.done("whole", THREE[1].ref, None, THREE[1].key)
            store.salvage()
    return root


@pytest.fixture
def root(folder: Path) -> Path:
    return folder / "store"


def again(before: Path, root: Path) -> str:
    shutil.rmtree(root, ignore_errors=True)
    if before.exists():
        shutil.copytree(before, root)
    return str(root)


def calls_of_a_build(before: Path, root: Path) -> list[str]:
    disk = FaultyDisk()
    assert build(again(before, root), disk) == PACK
    return disk.calls


def chosen(before: Path, root: Path, fault: Fault) -> Iterator[int]:
    for n, name in enumerate(calls_of_a_build(before, root)):
        if fault not in (Fault.SHORT, Fault.TORN) or name in HALVES:
            yield n


def name_of(before: Path) -> str:
    return f"put, {before.parent.name} store"


def assert_recovered(root: str, reached: list[str], *, realised: bool = True) -> None:
    """The store is sound, what was done is still known, and the same build finishes."""
    assert_sound(root, DIGESTS)
    with Store.open(root, disk=UnsyncedDisk()) as store:
        if "pack" in reached:
            assert store.pack(PACK)
            assert set(store.locations(DIGESTS)) == set(DIGESTS)
            if realised:
                assert store.realisations(s.key for s in THREE) == {s.key: s.ref for s in THREE}
        manifest = manifest_of(FinishedPack(PACK, "", PackLayout.of((s.name, s.spec) for s in THREE).size), THREE)
        if "manifest" in reached:
            assert store.manifest(manifest.digest) == manifest
        if "root" in reached:
            assert manifest.digest in {kept.manifest for kept in store.roots()}
    assert build(root, UnsyncedDisk()) == PACK
    assert_sound(root, DIGESTS)
    with Store.open(root, disk=UnsyncedDisk()) as store:
        store.salvage()
        store.drop_salvaged()
        assert store.info().tmp_bytes == 0


@pytest.mark.parametrize("fault", [Fault.KILL, Fault.TORN])
def test_killed_at_any_call(fault: Fault, before: Path, root: Path, counted: Counted) -> None:
    at = list(chosen(before, root, fault))
    for n in at:
        disk, reached = FaultyDisk(n, fault), []
        with pytest.raises(Killed):
            build(again(before, root), disk, reached)
        disk.bury()
        assert_recovered(str(root), reached)
    counted(name_of(before), len(calls_of_a_build(before, root)), len(at))


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC, Fault.SHORT])
def test_a_failure_at_any_call_is_an_error_of_the_store(
    fault: Fault, before: Path, root: Path, counted: Counted
) -> None:
    codes, at = set(), list(chosen(before, root, fault))
    for n in at:
        disk, reached = FaultyDisk(n, fault), []
        with pytest.raises(StoreError) as caught:
            build(again(before, root), disk, reached)
        codes.add(caught.value.code)
        assert caught.value.at
        disk.bury()
        assert_recovered(str(root), reached)
    assert codes == ({"KB704"} if fault is Fault.ENOSPC else {"KB705"})
    counted(name_of(before), len(calls_of_a_build(before, root)), len(at))


def test_after_a_failure_the_same_process_goes_on(before: Path, root: Path) -> None:
    for n in chosen(before, root, Fault.EIO):
        disk = FaultyDisk(n, Fault.EIO)
        with suppress(StoreError):
            build(again(before, root), disk)
        if disk.calls[n] != "close":  # what could not be closed may stay locked until the process ends
            assert build(str(root), disk) == PACK
        disk.bury()


@pytest.mark.parametrize("keep_names", [False, True])
@pytest.mark.parametrize("keep_index", [False, True])
def test_a_power_cut_loses_nothing_that_was_done(keep_names: bool, keep_index: bool, folder: Path) -> None:
    """At each sync, rename and deletion of a build in a new store. Without the index, realisations are in manifests."""
    base = folder / f"power-{keep_names}-{keep_index}"
    reached: list[str] = []
    cuts: list[tuple[str, list[str]]] = []

    def cut(disk: PowerCutDisk) -> None:
        target = str(base / f"cut{len(cuts)}")
        disk.cut(target, keep_names=keep_names, keep_index=keep_index)
        cuts.append((target, list(reached)))

    disk = PowerCutDisk(str(base / "store"), at=cut)
    os.makedirs(disk.root)
    assert build(disk.root, disk, reached) == PACK
    assert len(cuts) > 30
    for target, done in cuts:
        assert_recovered(target, done, realised=keep_index or "manifest" in done)


def test_the_power_cut_disk_notices_a_missing_sync(tmp_path: Path) -> None:
    class Hasty(PowerCutDisk):
        def fsync(self, fd: int) -> None:
            pass

    disk = Hasty(str(tmp_path / "disk"))
    os.mkdir(disk.root)
    disk.write_file(f"{disk.root}/file", b"data")
    disk.cut(str(tmp_path / "after"), keep_names=True)
    assert (tmp_path / "after/file").read_bytes() == bytes(4)


def test_a_process_that_ends_at_any_call(before: Path, root: Path, counted: Counted) -> None:
    at = list(chosen(before, root, Fault.EXIT))
    for n in at:
        again(before, root)
        child = os.fork()
        if child == 0:
            try:
                build(str(root), FaultyDisk(n, Fault.EXIT))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert_sound(str(root), DIGESTS)
        assert build(str(root), UnsyncedDisk()) == PACK
    counted(name_of(before), len(calls_of_a_build(before, root)), len(at))


def test_a_full_disk_says_how_much_was_wanted(tmp_path: Path) -> None:
    class Full(Disk):
        def _allocate(self, fd: int, size: int) -> None:
            raise OSError(28, "No space left on device")

    with Store.open(str(tmp_path), disk=Full()) as store:
        with pytest.raises(StoreError, match="the disk is full: 12,310 bytes were wanted") as caught:
            store.write_pack((s.name, s.spec) for s in THREE)
        assert caught.value.code == "KB704"
        assert "finished tensors are kept" in str(caught.value.hint)
        assert store.info().tmp_bytes == 0
    assert Digest.of(b"") not in DIGESTS
