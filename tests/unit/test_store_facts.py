"""What a store remembers, and how it says that something is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kittybuild.digest import Digest, tagged
from kittybuild.errors import StoreError
from kittybuild.model.manifest import Manifest, ManifestTensor
from kittybuild.store.disk import Disk
from kittybuild.store.facts import Location
from kittybuild.store.store import DamagedTensor, Root, Store
from kittybuild.tensors import DType, TensorRef, TensorSpec
from tests.faults import SMALL_FILE, THREE, Sample, UnsyncedDisk, build, fill, manifest_of, put_pack, sample

KEY, OTHER = tagged("test", "key"), tagged("test", "other")
DIGESTS = tuple(s.ref.digest for s in THREE)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def store(root: str) -> Iterator[Store]:
    with Store.open(root, disk=UnsyncedDisk()) as store:
        yield store


def reopened(store: Store) -> Store:
    store.close()
    return Store.open(store.root, disk=UnsyncedDisk())


def lose_index(store: Store) -> Store:
    store.close()
    shutil.rmtree(f"{store.root}/index")
    return Store.open(store.root, disk=UnsyncedDisk())


class TestOpening:
    def test_a_store_is_made_where_there_is_none(self, root: str) -> None:
        assert not Store.exists(root)
        with Store.open(root) as store:
            assert store.root == root
            assert Store.exists(root)
            assert Path(root, "FORMAT").read_bytes() == b"kittybuild-store 2\n"
            folders = {path.name for path in Path(root).iterdir() if path.is_dir()}
            assert folders == {"packs", "files", "index", "manifests", "roots", "tmp", "locks"}

    def test_it_may_be_opened_again_and_closed_twice(self, store: Store) -> None:
        with Store.open(store.root) as other:
            other.realise({KEY: THREE[0].ref})
        assert store.realisation(KEY) == THREE[0].ref
        store.close()
        store.close()

    def test_a_relative_path_is_meant_from_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with Store.open("here") as store:
            monkeypatch.chdir("/")
            assert store.root == str(tmp_path / "here")
            assert put_pack(store, THREE).path.startswith(store.root)

    def test_a_folder_with_other_things_in_it_becomes_a_store_too(self, root: str) -> None:
        os.mkdir(root)
        Path(root, "FORMAT.md").touch()
        build(root, UnsyncedDisk())
        assert Path(root, "FORMAT.md").exists()

    def test_a_store_that_was_moved_is_the_same(self, store: Store, tmp_path: Path) -> None:
        put_pack(store, THREE)
        store.close()
        os.rename(store.root, tmp_path / "moved")
        with Store.open(str(tmp_path / "moved")) as moved:
            location = moved.location(DIGESTS[0])
            assert location is not None
            assert location.path.startswith(str(tmp_path / "moved/packs/"))

    def test_another_format_is_refused(self, root: str) -> None:
        Store.open(root).close()
        Path(root, "FORMAT").write_text("kittybuild-store 3\n")
        with pytest.raises(StoreError) as caught:
            Store.open(root)
        assert str(caught.value) == (
            f"{root}: KB702: this store is of format 'kittybuild-store 3', "
            "and this kittybuild knows 'kittybuild-store 2'\n"
            "  hint: use the kittybuild that made it, or another folder with --store"
        )

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
    def test_a_folder_that_cannot_be_written_is_refused(self, root: str, code: int) -> None:
        class ReadOnly(Disk):
            def open_lock(self, path: str) -> int:
                raise OSError(code, os.strerror(code), path)

        with pytest.raises(StoreError) as caught:
            Store.open(root, disk=ReadOnly())
        assert str(caught.value) == (
            f"{root}: KB701: cannot open the store for writing: {os.strerror(code)}\n"
            "  hint: name a folder that you may write, with --store or KITTYBUILD_STORE"
        )

    def test_a_file_is_no_store(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in ("file", "file/below"):
            with pytest.raises(StoreError, match="KB701"):
                Store.open(str(tmp_path / path))
            assert not Store.exists(str(tmp_path / path))

    def test_it_starts_without_torch_and_numpy(self) -> None:
        code = "import sys, kittybuild.store.store; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestFacts:
    def test_realisations_are_known_by_key(self, store: Store) -> None:
        assert store.realisation(KEY) is None
        facts = {s.key: s.ref for s in THREE}
        for _ in range(2):
            store.realise(facts)
        assert store.realisations([*facts, KEY]) == facts
        assert store.realisation(THREE[0].key) == THREE[0].ref
        store.realise({})
        assert reopened(store).realisations(facts) == facts

    def test_a_derivation_that_makes_two_things_is_an_error_and_the_first_stays(self, store: Store) -> None:
        first, second = THREE[0].ref, TensorRef(THREE[0].ref.digest, TensorSpec(DType.I32, (5,)))
        store.realise({KEY: first})
        with pytest.raises(StoreError) as caught:
            store.realise({KEY: second, OTHER: second})
        assert str(caught.value) == (
            f"{store.root}: KB703: not deterministic: derivation {KEY} made I32[5] {second.digest}, "
            f"but earlier F32[5] {first.digest}\n"
            "  hint: the first is kept; build again in an empty store (--store) to see which of the two comes back"
        )
        assert store.realisations([KEY, OTHER]) == {KEY: first, OTHER: second}

    def test_a_location_says_where_the_bytes_are(self, store: Store) -> None:
        pack = put_pack(store, THREE)
        for s in THREE:
            location = store.location(s.ref.digest)
            assert location is not None
            assert (location.path, location.nbytes) == (pack.path, len(s.data))
            assert location.xxh3 is not None
            assert Path(pack.path).read_bytes()[location.offset :][: location.nbytes] == s.data
        assert store.location(KEY) is None
        assert set(store.locations([*DIGESTS, KEY])) == set(DIGESTS)
        os.unlink(pack.path)
        assert store.locations(DIGESTS) == {}
        assert store.pack(pack.digest) is None

    def test_no_location_leads_out_of_the_store(self, store: Store) -> None:
        put_pack(store, THREE)
        for place in ("../elsewhere", "/etc/passwd", "packs/../../x", "FORMAT", "index/cache.db"):
            path = os.path.join(store.root, place)
            store._facts.set_locations({DIGESTS[0]: Location(path, 0, 1, None)})
            assert store.location(DIGESTS[0]) is None

    def test_memos_of_a_file_come_together_and_add_up(self, store: Store) -> None:
        assert store.memos(KEY) == {}
        store.remember(KEY, {"a": DIGESTS[0], 'q"\ud800/\N{CAT FACE}': DIGESTS[1]})
        store.remember(OTHER, {"a": DIGESTS[2]})
        store.remember(KEY, {"c": DIGESTS[2], "a": DIGESTS[2]})
        store.remember(KEY, {})
        assert store.memos(KEY) == {"a": DIGESTS[2], 'q"\ud800/\N{CAT FACE}': DIGESTS[1], "c": DIGESTS[2]}
        assert store.memos(OTHER) == {"a": DIGESTS[2]}

    def test_a_shortcut_leads_to_a_manifest_that_may_be_gone(self, store: Store) -> None:
        assert store.shortcut(KEY) is None
        store.set_shortcut(KEY, OTHER)
        store.set_shortcut(KEY, DIGESTS[0])
        assert store.shortcut(KEY) == DIGESTS[0]
        assert store.manifest(DIGESTS[0]) is None


class TestContent:
    def test_manifests_and_files_are_kept_by_content(self, store: Store) -> None:
        manifest = manifest_of(put_pack(store, THREE), THREE)
        for _ in range(2):
            digest = store.put_manifest(manifest)
            assert digest == manifest.digest
            assert store.put_file(SMALL_FILE) == Digest.of(SMALL_FILE)
        assert store.manifest(digest) == manifest
        assert store.read_file(Digest.of(SMALL_FILE)) == SMALL_FILE
        path = store.file(Digest.of(SMALL_FILE))
        assert path is not None
        assert Path(path).read_bytes() == SMALL_FILE
        assert store.put_file(b"") == Digest.of(b"")
        assert store.read_file(Digest.of(b"")) == b""

    def test_what_is_absent_is_none(self, store: Store) -> None:
        assert store.manifest(KEY) is None
        assert store.file(KEY) is None
        assert store.read_file(KEY) is None
        assert store.pack(KEY) is None

    def test_a_manifest_of_another_format_is_absent_and_stays(self, store: Store) -> None:
        data = b'{"kittybuild.manifest": 2}'
        path = Path(store.root, f"manifests/{Digest.of(data).hex[:2]}/{Digest.of(data).hex}.json")
        path.parent.mkdir()
        path.write_bytes(data)
        assert store.manifest(Digest.of(data)) is None
        assert path.exists()

    def test_a_manifest_brings_its_realisations(self, store: Store) -> None:
        tensors = (ManifestTensor("a", THREE[0].ref, KEY), ManifestTensor("b", THREE[1].ref, None))
        store.put_manifest(Manifest(tensors, ()))
        assert store.realisation(KEY) == THREE[0].ref


class TestPacks:
    def test_a_pack_is_complete_or_absent(self, store: Store) -> None:
        with store.write_pack((s.name, s.spec) for s in THREE) as writer:
            fill(writer, THREE[:2])
            with pytest.raises(ValueError, match="1 tensors are not done, the first is 'scalar'"):
                writer.finish()
            assert store.info().interrupted == 1
            fill(writer, THREE[2:])
            pack = writer.finish()
        assert store.pack(pack.digest) == pack.path
        assert os.stat(pack.path).st_mode & 0o777 == 0o444
        assert store.realisations(s.key for s in THREE) == {s.key: s.ref for s in THREE}
        assert list(Path(store.root, "tmp").iterdir()) == []
        writer.abandon()

    def test_a_pack_that_is_there_is_not_replaced(self, store: Store) -> None:
        one = put_pack(store, THREE)
        inode = os.stat(one.path).st_ino
        two = put_pack(store, THREE)
        assert one == two
        assert os.stat(two.path).st_ino == inode
        assert list(Path(store.root, "tmp").iterdir()) == []

    def test_a_pack_that_was_changed_under_another_name_is_noticed(self, store: Store, tmp_path: Path) -> None:
        pack = put_pack(store, THREE)
        os.utime(pack.path, ns=(1, 1))
        assert store.pack(pack.digest) == pack.path, "only its time changed: its tensors were read, and are right"
        os.link(pack.path, tmp_path / "model.safetensors")
        os.chmod(pack.path, 0o644)
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.seek(5000)
            file.write(b"edited")
        assert store.pack(pack.digest) is None
        assert put_pack(store, THREE) == pack
        assert store.pack(pack.digest) == pack.path
        assert b"edited" in (tmp_path / "model.safetensors").read_bytes()

    def test_a_tensor_is_copied_from_the_pack_that_holds_it(self, store: Store) -> None:
        put_pack(store, THREE)
        new = sample("new")
        with store.write_pack([("renamed", THREE[1].spec), ("new", new.spec)]) as writer:
            location = store.location(THREE[1].ref.digest)
            assert location is not None
            writer.copy("renamed", THREE[1].ref, location)
            fill(writer, [new])
            pack = writer.finish()
        location = store.location(THREE[1].ref.digest)
        assert location is not None
        assert location.path == pack.path

    def test_nothing_is_written_outside_its_tensor(self, store: Store) -> None:
        with store.write_pack((s.name, s.spec) for s in THREE) as writer:
            for offset, size in ((-1, 1), (0, 21), (20, 1), (21, 0)):
                with pytest.raises(ValueError, match="not all inside the tensor"):
                    writer.write("odd", offset, bytes(size))
            writer.write("odd", 20, b"")
            with pytest.raises(KeyError):
                writer.write("unknown", 0, b"")
            with pytest.raises(ValueError, match=r"odd: BF16\[2, 2048\] does not fit the pack's F32\[5\]"):
                writer.done("odd", THREE[1].ref, None, None)

    def test_a_pack_may_be_given_up(self, store: Store) -> None:
        writer = store.write_pack((s.name, s.spec) for s in THREE)
        fill(writer, THREE)
        writer.discard()
        writer.discard()
        assert list(Path(store.root, "tmp").iterdir()) == []
        assert store.salvage().tensors == 0

    def test_a_failed_sync_stays_failed(self, root: str) -> None:
        class Once(UnsyncedDisk):
            broken = False

            def fsync(self, fd: int) -> None:
                if self.broken:
                    self.broken = False
                    raise OSError(errno.EIO, "Input/output error")

        disk = Once()
        with Store.open(root, disk=disk) as store, store.write_pack((s.name, s.spec) for s in THREE) as writer:
            fill(writer, THREE)
            writer.flush()
            disk.broken = True
            with pytest.raises(StoreError, match="KB705: cannot finish: Input/output error"):
                writer.finish()
            with pytest.raises(StoreError, match="KB705: cannot finish: an earlier sync failed"):
                writer.finish()

    def test_what_an_operation_was_and_where_it_failed_is_told(self, root: str) -> None:
        class Bad(UnsyncedDisk):
            def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
                if offset > 0:
                    raise OSError(errno.EIO, "Input/output error")
                super().pwrite(fd, data, offset)

        with Store.open(root, disk=Bad()) as store, store.write_pack((s.name, s.spec) for s in THREE) as writer:
            with pytest.raises(StoreError) as caught:
                writer.write("odd", 0, b"abc")
            (part,) = Path(root, "tmp").glob("*.part")
            assert str(caught.value) == (
                f"{part}: KB705: cannot write: Input/output error\n  hint: see that the disk is healthy and the folder "
                "yours to write, then run again: what was finished is kept"
            )

    def test_a_damaged_tensor_names_the_file_to_discard(self) -> None:
        error = DamagedTensor("/store/pack", "the bytes at 7 are not tensor x")
        assert (error.path, error.code, error.exit_status) == ("/store/pack", "KB710", 7)
        assert str(error) == (
            "/store/pack: KB710: damaged: the bytes at 7 are not tensor x\n"
            "  hint: the file is set aside and its tensors made again"
        )

    def test_discarding_what_is_absent_is_fine(self, store: Store) -> None:
        store.discard(f"{store.root}/packs/ab/{'ab' * 32}.safetensors")
        store.discard(f"{store.root}/tmp/absent.part")
        store.discard("/elsewhere")
        assert store.info().tmp_bytes == 0

    def test_a_discarded_pack_is_replaced_by_others_that_hold_its_tensors(self, store: Store) -> None:
        first = put_pack(store, THREE)
        second = put_pack(store, [THREE[0], sample("new")])
        os.chmod(second.path, 0o600)
        Path(second.path).write_bytes(bytes(second.size))
        store.discard(second.path)
        location = store.location(DIGESTS[0])
        assert location is not None
        assert location.path == first.path
        assert store.location(sample("new").ref.digest) is None


class TestRoots:
    def test_a_root_is_kept_for_each_output(self, store: Store) -> None:
        assert store.roots() == ()
        store.set_root("calm", "/a", KEY)
        store.set_root("calm", "/b", KEY)
        store.set_root("calm", "/a", OTHER)
        assert store.roots() == (Root("calm", "/a", OTHER), Root("calm", "/b", KEY))
        store.drop_root("calm", "/b")
        store.drop_root("calm", "/b")
        assert reopened(store).roots() == (Root("calm", "/a", OTHER),)


class TestInfo:
    def test_everything_is_counted(self, store: Store) -> None:
        build(store.root, UnsyncedDisk())
        with store.write_pack([("new", sample("new").spec)]):
            pass
        info = store.info()
        tmp = sum(path.stat().st_size for path in Path(store.root, "tmp").iterdir())
        assert info.to_json() == {
            "format": "kittybuild-store 2",
            "packs": 1,
            "pack_bytes": 12310,
            "files": 1,
            "manifests": 1,
            "realisations": 3,
            "locations": 3,
            "roots": 1,
            "interrupted": 1,
            "tmp_bytes": tmp,
        }
        json.dumps(info.to_json())


class TestLosingTheIndex:
    def test_it_is_made_again_from_packs_and_manifests(self, store: Store) -> None:
        pack = build(store.root, UnsyncedDisk())
        with lose_index(store) as store:
            assert store.realisations(s.key for s in THREE) == {s.key: s.ref for s in THREE}
            locations = store.locations(DIGESTS)
            assert set(locations) == set(DIGESTS)
            assert {location.xxh3 for location in locations.values()} == {None}
            assert store.pack(pack)

    def test_an_interrupted_rebuild_is_gone_on_with(self, store: Store) -> None:
        build(store.root, UnsyncedDisk())
        store.close()
        shutil.rmtree(f"{store.root}/index")

        class Bad(UnsyncedDisk):
            def write_file(self, path: str, data: bytes | bytearray | memoryview, mode: int = 0) -> None:
                raise AssertionError("nothing is written")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kittybuild.store.content.Content.adopt_unknown", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                Store.open(store.root, disk=Bad())
        with Store.open(store.root, disk=Bad()) as store:
            assert store.realisations(s.key for s in THREE) == {s.key: s.ref for s in THREE}

    def test_rebuilding_finds_what_came_by_other_ways(self, store: Store, tmp_path: Path) -> None:
        put_pack(store, [sample("mine")])
        store.set_shortcut(KEY, OTHER)
        store.remember(KEY, {"a": DIGESTS[0]})
        other = str(tmp_path / "other")
        build(other, UnsyncedDisk())
        for folder in ("packs", "manifests", "files"):
            shutil.copytree(f"{other}/{folder}", f"{store.root}/{folder}", dirs_exist_ok=True)
        store.rebuild_index()
        assert set(store.locations(DIGESTS)) == set(DIGESTS)
        assert store.realisations(s.key for s in THREE) == {s.key: s.ref for s in THREE}
        assert store.location(sample("mine").ref.digest) is not None
        assert store.shortcut(KEY) == OTHER
        assert store.memos(KEY) == {"a": DIGESTS[0]}

    def test_a_pack_with_a_wrong_name_or_header_is_set_aside(self, store: Store) -> None:
        pack = put_pack(store, THREE)
        wrong = Path(store.root, f"packs/aa/{'a' * 64}.safetensors")
        junk = Path(store.root, f"packs/bb/{'b' * 64}.safetensors")
        left = Path(store.root, "packs/cc/notes.txt")
        for path in (wrong, junk, left):
            path.parent.mkdir(exist_ok=True)
        shutil.move(pack.path, wrong)
        junk.write_bytes(b"junk")
        left.touch()
        with lose_index(store) as store:
            assert not wrong.exists()
            assert not junk.exists()
            assert left.exists()
            assert set(store.locations(DIGESTS)) == set(DIGESTS), "its tensors are what they are, whatever its name"
            assert put_pack(store, THREE) == pack
            store.drop_salvaged()
            assert store.info().tmp_bytes == 0

    def test_two_manifests_that_disagree_give_the_first_in_order(self, store: Store) -> None:
        refs = (THREE[0].ref, THREE[1].ref)
        manifests = [Manifest((ManifestTensor("a", ref, KEY),), ()) for ref in refs]
        for manifest in manifests:
            store.put_manifest(manifest)
        with lose_index(store) as store:
            assert store.realisation(KEY) == min(manifests, key=lambda m: m.digest).tensors[0].ref


def test_samples_are_what_they_say() -> None:
    assert all(isinstance(s, Sample) and len(s.data) == s.spec.nbytes for s in THREE)
