"""What an interrupted writer finished is used, in place where it can be; what is worth nothing is deleted."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kittybuild.digest import Digest
from kittybuild.errors import StoreError
from kittybuild.store.store import Salvaged, Store
from kittybuild.tensors import DType
from tests.faults import THREE, UnsyncedDisk, build, fill, put_pack, sample

DIGESTS = tuple(s.ref.digest for s in THREE)
NOTHING = Salvaged(0, 0, 0)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def store(root: str) -> Iterator[Store]:
    with Store.open(root, disk=UnsyncedDisk()) as store:
        yield store


def interrupt(store: Store, done: int = 2) -> None:
    with store.write_pack((s.name, s.spec) for s in THREE) as writer:
        fill(writer, THREE[:done])


def tmp(store: Store) -> list[str]:
    return sorted(path.suffix for path in Path(store.root, "tmp").iterdir())


def test_finished_tensors_of_an_interrupted_pack_are_found(store: Store) -> None:
    interrupt(store)
    assert store.locations(DIGESTS) == {}
    assert store.salvage() == Salvaged(2, 20 + 8192, 1)
    assert set(store.locations(DIGESTS)) == set(DIGESTS[:2])
    assert store.realisations(s.key for s in THREE) == {s.key: s.ref for s in THREE[:2]}
    assert store.salvage() == NOTHING, "they are adopted already"
    store.close()
    with Store.open(store.root) as again:
        assert set(again.locations(DIGESTS)) == set(DIGESTS[:2])
        assert again.salvage() == Salvaged(2, 20 + 8192, 1), "until a pack holds them"
        assert set(again.locations(DIGESTS)) == set(DIGESTS[:2])


@pytest.mark.parametrize("dropped", [True, False])
def test_a_pack_of_the_same_layout_is_gone_on_with_in_place(store: Store, dropped: bool) -> None:
    interrupt(store)
    (part,) = Path(store.root, "tmp").glob("*.part")
    inode = part.stat().st_ino
    store.salvage()

    class NoCopy(UnsyncedDisk):
        def copy_range(self, *args: int) -> None:
            raise AssertionError("what is in its place needs no copy")

    store.disk = NoCopy()
    locations = store.locations(DIGESTS)
    with store.write_pack((s.name, s.spec) for s in THREE) as writer:
        for s in THREE[:2]:
            writer.copy(s.name, s.ref, locations[s.ref.digest], s.key)
        fill(writer, THREE[2:])
        pack = writer.finish()
    assert os.stat(pack.path).st_ino == inode
    for digest, location in locations.items():  # whoever was told these can still read there
        with open(location.path, "rb") as file:
            assert Digest.of(os.pread(file.fileno(), location.nbytes, location.offset)) == digest
    assert {location.path for location in store.locations(DIGESTS).values()} == {pack.path}
    store.drop_salvaged() if dropped else store.close()
    assert tmp(store) == []
    assert os.stat(pack.path).st_nlink == 1


def test_without_links_the_old_name_goes(root: str) -> None:
    class NoLinks(UnsyncedDisk):
        def link(self, src: str, dst: str) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

    with Store.open(root, disk=NoLinks()) as store:
        interrupt(store)
        store.salvage()
        pack = put_pack(store, THREE)
        assert tmp(store) == []
        assert store.pack(pack.digest) == pack.path


def test_a_damaged_pack_is_never_written_to_since_an_output_may_share_it(store: Store, tmp_path: Path) -> None:
    pack = put_pack(store, THREE)
    shard = tmp_path / "model.safetensors"
    os.link(pack.path, shard)
    os.chmod(pack.path, 0o644)
    with open(pack.path, "r+b") as file:
        file.seek(4096)
        file.write(b"damage")
    before = shard.read_bytes()
    store.discard(pack.path)
    assert store.pack(pack.digest) is None
    assert store.location(DIGESTS[1]) is None
    assert put_pack(store, THREE) == pack
    store.drop_salvaged()
    assert shard.read_bytes() == before
    assert Path(pack.path).read_bytes() != before
    assert stat.S_IMODE(shard.stat().st_mode) == 0o644
    assert tmp(store) == []


def test_a_pack_that_was_gone_on_with_may_be_interrupted_again(store: Store) -> None:
    for done in range(3):
        store.salvage()
        with store.write_pack((s.name, s.spec) for s in THREE) as writer:
            for s in THREE[:done]:
                location = store.location(s.ref.digest)
                assert location is not None
                writer.copy(s.name, s.ref, location, s.key)
            fill(writer, [THREE[done]])
        assert tmp(store) == [".journal", ".part"]
    store.salvage()
    assert set(store.locations(DIGESTS)) == set(DIGESTS)


def test_a_tensor_that_is_written_again_is_not_taken_for_verified(store: Store) -> None:
    interrupt(store)
    store.salvage()
    with store.write_pack((s.name, s.spec) for s in THREE) as writer:
        location = store.location(DIGESTS[0])
        assert location is not None
        writer.write("odd", 0, b"other bytes")
        with pytest.raises(StoreError, match="KB710"):
            writer.copy("odd", THREE[0].ref, location)


def test_a_pack_of_another_layout_copies_what_was_salvaged(store: Store) -> None:
    interrupt(store)
    store.salvage()
    new = sample("new")
    with store.write_pack([*((s.name, s.spec) for s in THREE[:2]), ("new", new.spec)]) as writer:
        for s in THREE[:2]:
            location = store.location(s.ref.digest)
            assert location is not None
            assert location.path.endswith(".part")
            writer.copy(s.name, s.ref, location, s.key)
        fill(writer, [new])
        pack = writer.finish()
    store.drop_salvaged()
    assert tmp(store) == []
    assert {location.path for location in store.locations(DIGESTS).values()} == {pack.path}


def test_what_no_pack_took_is_forgotten_with_the_file(store: Store) -> None:
    interrupt(store)
    store.salvage()
    put_pack(store, [THREE[0]])
    store.drop_salvaged()
    assert tmp(store) == []
    assert set(store.locations(DIGESTS)) == {DIGESTS[0]}


@pytest.mark.parametrize("done", [0, 2])
def test_a_file_with_nothing_of_its_own_is_deleted(store: Store, done: int) -> None:
    put_pack(store, THREE)
    other = (*THREE[:2], sample("never done"))
    with store.write_pack((s.name, s.spec) for s in other) as writer:
        fill(writer, other[:done])
    assert tmp(store) == [".journal", ".part"]
    assert store.salvage() == NOTHING
    assert tmp(store) == []


def test_bytes_that_are_not_what_the_journal_says_are_not_used(store: Store) -> None:
    with store.write_pack((s.name, s.spec) for s in THREE) as writer:
        writer.write("whole", 0, THREE[1].data)
        writer.done("whole", THREE[1].ref, None, THREE[1].key)
        writer.done("odd", THREE[0].ref, None, THREE[0].key)  # a lie: its bytes are zeros
    assert store.salvage() == Salvaged(1, 8192, 1)
    assert store.location(DIGESTS[0]) is None
    assert store.realisation(THREE[0].key) is None


def test_files_without_a_journal_or_a_file_are_cleared_away(store: Store) -> None:
    folder = Path(store.root, "tmp")
    (folder / "a.part").write_bytes(b"junk" * 5000)
    (folder / "b.part").touch()
    (folder / "c.journal").write_bytes(b"junk")
    (folder / ".d.tmp").touch()
    (folder / "notes").touch()
    assert store.salvage() == NOTHING
    assert [path.name for path in folder.iterdir()] == ["notes"]


def test_a_journal_that_outlived_its_file_still_tells_of_derivations(store: Store) -> None:
    """A process that died after its pack was in its place, and before the index knew what made the tensors."""
    interrupt(store, 3)
    (journal,) = Path(store.root, "tmp").glob("*.journal")
    kept = journal.read_bytes()
    for path in Path(store.root, "tmp").iterdir():
        path.unlink()
    with store.write_pack((s.name, s.spec) for s in THREE) as writer:
        for s in THREE:
            writer.write(s.name, 0, s.data)
            writer.done(s.name, s.ref, None, None)
        writer.finish()
    assert store.realisations(s.key for s in THREE) == {}
    journal.write_bytes(kept)
    store.salvage()
    assert store.realisations(s.key for s in THREE) == {s.key: s.ref for s in THREE}
    assert tmp(store) == []


def test_a_pack_that_the_index_does_not_know_is_found(store: Store, tmp_path: Path) -> None:
    """A process that died between the rename and the index."""
    other = str(tmp_path / "other")
    pack = build(other, UnsyncedDisk())
    source = next(Path(other).glob("packs/*/*.safetensors"))
    target = Path(store.root, source.relative_to(other))
    target.parent.mkdir()
    target.write_bytes(source.read_bytes())
    assert store.locations(DIGESTS) == {}
    assert store.salvage() == NOTHING
    assert set(store.locations(DIGESTS)) == set(DIGESTS)
    assert store.pack(pack) == str(target)


def test_equal_and_empty_tensors_are_salvaged_too(store: Store) -> None:
    same = [sample("one"), sample("one"), sample("empty", DType.F32, (0,))]
    names = ["a", "b", "c"]
    with store.write_pack(zip(names, (s.spec for s in same), strict=True)) as writer:
        for name, s in zip(names, same, strict=True):
            writer.write(name, 0, s.data)
            writer.done(name, s.ref, None, None)
    assert store.salvage() == Salvaged(2, 20, 1)
    locations = store.locations(s.ref.digest for s in same)
    with store.write_pack(zip(names[::-1], (s.spec for s in same[::-1]), strict=True)) as writer:
        for name, s in zip(names, same, strict=True):
            writer.copy(name, s.ref, locations[s.ref.digest])
        writer.finish()
    store.drop_salvaged()
    assert tmp(store) == []
    assert set(store.locations(s.ref.digest for s in same)) == {s.ref.digest for s in same}


def test_a_writer_that_is_alive_is_left_alone(store: Store) -> None:
    writer = store.write_pack((s.name, s.spec) for s in THREE)
    fill(writer, THREE[:1])
    assert store.salvage() == NOTHING
    fill(writer, THREE[1:])
    assert store.pack(writer.finish().digest)


def test_a_tensor_that_a_pack_turns_out_to_hold_is_not_forgotten_with_the_file(store: Store, tmp_path: Path) -> None:
    interrupt(store)
    store.salvage()
    other = tmp_path / "other"
    pack = build(str(other), UnsyncedDisk())
    shutil.copytree(other / "packs", Path(store.root, "packs"), dirs_exist_ok=True)
    path = store.pack(pack)
    store.drop_salvaged()
    assert {location.path for location in store.locations(DIGESTS).values()} == {path}
    assert set(store.locations(DIGESTS)) == set(DIGESTS)
