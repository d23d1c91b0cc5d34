"""Garbage collection: what goes, what stays, and in which order."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kittybuild.errors import StoreError
from kittybuild.store.gc import Policy
from kittybuild.store.reserve import SIZE
from kittybuild.store.store import FinishedPack, Store
from kittybuild.tensors import DType
from tests.faults import Sample, UnsyncedDisk, assert_sound, fill, manifest_of, put_pack, quick_folder, sample

BLOCKS = [sample(f"b{n}", DType.U8, (8192,)) for n in range(6)]
DAY = 86_400.0


@pytest.fixture
def store() -> Iterator[Store]:
    with quick_folder() as path, Store.open(str(path / "store"), disk=UnsyncedDisk()) as store:
        yield store


def rooted(store: Store, samples: list[Sample], folder: str = "/out") -> FinishedPack:
    """A pack that the output in `folder` needs."""
    pack = put_pack(store, samples)
    store.put_file(b'{"model_type": "pico"}')
    store.set_root("calm", folder, store.put_manifest(manifest_of(pack, samples)))
    return pack


def aged(pack: FinishedPack, days: float) -> FinishedPack:
    then = time.time() - days * DAY
    os.utime(pack.path, (then, then))
    return pack


def there(*packs: FinishedPack) -> list[bool]:
    return [os.path.exists(pack.path) for pack in packs]


def test_what_no_root_keeps_goes_and_realisations_stay(store: Store) -> None:
    one, two = rooted(store, BLOCKS[:1], "/project/a"), rooted(store, BLOCKS[1:2], "/project/b")
    other = put_pack(store, BLOCKS[2:4])
    loose = store.put_manifest(manifest_of(other, BLOCKS[2:4]))
    plan = store.plan_gc(Policy())
    assert {(doomed.kind, doomed.digest) for doomed in plan.delete} == {("pack", other.digest), ("manifest", loose)}
    assert plan.freed >= other.size
    assert there(one, two, other) == [True] * 3
    done = store.collect(Policy())
    assert (done.files, there(one, two, other)) == (2, [True, True, False])
    assert store.realisation(BLOCKS[2].key) == BLOCKS[2].ref
    assert store.location(BLOCKS[2].ref.digest) is None
    assert store.pack(other.digest) is None
    assert store.manifest(loose) is None
    store.drop_root("calm", "/project/a")
    store.collect(Policy())
    assert there(one, two) == [False, True]
    assert_sound(store.root)


def test_manifests_and_files_beside_a_root_stay(store: Store) -> None:
    pack = put_pack(store, BLOCKS[:1])
    lock, inner = store.put_file(b"lock"), store.put_manifest(manifest_of(pack, BLOCKS[:1]))
    main = put_pack(store, BLOCKS[1:2])
    store.put_file(b'{"model_type": "pico"}')
    store.set_root("calm", "/out", store.put_manifest(manifest_of(main, BLOCKS[1:2])), also=(lock, inner))
    store.collect(Policy())
    assert there(pack, main) == [False, True]
    assert store.read_file(lock) == b"lock"
    assert store.manifest(inner)


def test_what_was_used_lately_stays(store: Store) -> None:
    old, new = aged(put_pack(store, BLOCKS[:1]), 40), put_pack(store, BLOCKS[1:2])
    used = aged(put_pack(store, BLOCKS[2:3]), 40)
    with Store.open(store.root) as reader:
        assert reader.locations([BLOCKS[2].ref.digest])
    store.collect(Policy(older_than=30 * DAY))
    assert there(old, new, used) == [False, True, True]


def test_what_is_cheap_to_make_again_goes_first(store: Store) -> None:
    packs = [put_pack(store, [block]) for block in BLOCKS[:4]]
    store.set_costs({block.ref.digest: seconds for block, seconds in zip(BLOCKS, (5.0, 0.1, 9.0, 0.2), strict=False)})
    store.collect(Policy(max_size=packs[0].size * 2))
    assert there(*packs) == [True, False, True, False]
    store.collect(Policy(max_size=packs[0].size * 2))
    assert there(*packs) == [True, False, True, False]
    store.collect(Policy(max_size=packs[0].size))
    assert there(*packs) == [False, False, True, False]


def test_roots_count_towards_the_size_and_always_stay(store: Store) -> None:
    pack, other = rooted(store, BLOCKS[:3]), put_pack(store, BLOCKS[3:4])
    assert store.plan_gc(Policy(max_size=10)).rooted == pack.size
    store.collect(Policy(max_size=10))
    assert there(pack, other) == [True, False]


def test_a_pack_whose_tensors_lie_elsewhere_goes(store: Store) -> None:
    whole, part = rooted(store, BLOCKS[:3]), put_pack(store, BLOCKS[:2])
    store.collect(Policy(max_size=1 << 40))
    assert there(whole, part) == [True, False]
    assert {at.path for at in store.locations(block.ref.digest for block in BLOCKS[:3]).values()} == {whole.path}


def test_a_mostly_dead_pack_is_written_anew_with_what_is_worth_keeping(store: Store) -> None:
    whole, mixed = rooted(store, BLOCKS[:4]), put_pack(store, [*BLOCKS[:4], BLOCKS[4]])
    policy = Policy(max_size=1 << 40)
    (repacked,) = store.plan_gc(policy).repack
    assert (repacked.digest, [name for name, _ in repacked.own]) == (mixed.digest, [BLOCKS[4].name])
    done = store.collect(policy)
    assert (done.repacked, there(whole, mixed)) == (1, [True, False])
    location = store.location(BLOCKS[4].ref.digest)
    assert location is not None
    assert os.path.getsize(location.path) < mixed.size / 2
    assert not store.plan_gc(policy).delete
    assert_sound(store.root, [BLOCKS[4].ref.digest])


def test_what_an_output_folder_holds_too_frees_nothing(store: Store, tmp_path: Path) -> None:
    pack = put_pack(store, BLOCKS[:1])
    os.link(pack.path, f"{store.root}/shard")
    assert store.plan_gc(Policy()).freed == 0
    store.collect(Policy())
    assert there(pack) == [False]


def test_nothing_goes_while_another_process_uses_the_store(store: Store) -> None:
    pack = put_pack(store, BLOCKS[:1])
    with Store.open(store.root) as other:
        with pytest.raises(StoreError, match="KB707: locked by another process"):
            store.collect(Policy(), patience=0.05)
        assert other.pack(pack.digest)
    store.collect(Policy(), patience=0.05)
    assert there(pack) == [False]


def test_interrupted_work_stays_for_a_day(store: Store) -> None:
    with store.write_pack((s.name, s.spec) for s in BLOCKS[:2]) as writer:
        fill(writer, BLOCKS[:1])
    store.collect(Policy())
    assert store.info().interrupted == 1
    for path in Path(store.root, "tmp").iterdir():
        os.utime(path, (0, 0))
    Path(store.root, "tmp", "damaged-index-1").mkdir()
    Path(store.root, "files", ".abc.tmp").touch()
    store.collect(Policy())
    assert list(Path(store.root, "tmp").iterdir()) == list(Path(store.root, "files").glob(".*")) == []


def test_without_the_manifest_of_a_root_nothing_is_collected(store: Store) -> None:
    pack = rooted(store, BLOCKS[:1])
    (manifest,) = Path(store.root, "manifests").rglob("*.json")
    manifest.chmod(0o600)
    manifest.write_bytes(manifest.read_bytes().replace(b"b0", b"b1"))
    with pytest.raises(StoreError, match="KB706: damaged: the manifest of the output calm in /out"):
        store.collect(Policy())
    assert there(pack) == [True]
    assert manifest.exists()


def test_the_reserve_is_there_to_be_given_back(store: Store) -> None:
    reserve = Path(store.root, "reserve")
    assert reserve.stat().st_size == SIZE
    with Store.open(store.root, to_clean=True) as other:
        assert not reserve.exists()
        store.close()
        other.collect(Policy())
        assert reserve.exists()
