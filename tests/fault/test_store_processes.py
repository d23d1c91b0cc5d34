"""Several processes, and several threads, on one store at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from kittybuild.store.disk import Disk
from kittybuild.store.layout import PART
from kittybuild.store.store import Store
from tests.faults import THREE, UnsyncedDisk, assert_sound, build, fill, put_pack, sample

SPAWN = multiprocessing.get_context("spawn")
PACKS = tuple(tuple(sample(f"{pack}.{n}", shape=(1500,)) for n in range(4)) for pack in range(6))
DIGESTS = tuple(s.ref.digest for pack in PACKS for s in pack)


def build_all(root: str, start: Barrier) -> None:
    start.wait()
    for pack in PACKS:
        build(root, Disk(), samples=pack)


def build_forever(root: str, seed: int) -> None:
    chance = random.Random(seed)
    while True:
        build(root, UnsyncedDisk(), samples=tuple(chance.sample(PACKS[0] + PACKS[1], 5)))


def test_processes_that_write_the_same_packs_at_once(tmp_path: Path) -> None:
    root, start = str(tmp_path / "store"), SPAWN.Barrier(3)
    workers = [SPAWN.Process(target=build_all, args=(root, start)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert_sound(root, DIGESTS)
    with Store.open(root) as store:
        info = store.info()
        assert (info.packs, info.realisations, info.interrupted) == (6, 24, 0)
        assert set(store.locations(DIGESTS)) == set(DIGESTS)


def test_processes_killed_while_others_go_on(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    Store.open(root).close()
    for seed in range(3):
        workers = [SPAWN.Process(target=build_forever, args=(root, 10 * seed + n)) for n in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.6)
        for worker in workers:
            assert worker.pid
            os.kill(worker.pid, signal.SIGKILL)
            worker.join(60)
            assert worker.exitcode == -signal.SIGKILL
            assert_sound(root, DIGESTS)
    for pack in PACKS:
        build(root, UnsyncedDisk(), samples=pack)
    assert_sound(root, DIGESTS)


def test_one_pack_may_be_written_by_many_threads(tmp_path: Path) -> None:
    samples = [sample(f"t{n:02}", shape=(3000 + n,)) for n in range(24)]
    with Store.open(str(tmp_path), disk=UnsyncedDisk()) as store:
        writer = store.write_pack((s.name, s.spec) for s in samples)
        threads = [threading.Thread(target=fill, args=(writer, samples[n::4])) for n in range(4)]
        threads.append(threading.Thread(target=lambda: [writer.flush() for _ in range(20)]))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pack = writer.finish()
        writer.flush()  # late is fine
    with Store.open(str(tmp_path / "other"), disk=UnsyncedDisk()) as store:
        other = put_pack(store, samples)
    assert other.digest == pack.digest
    assert Path(other.path).read_bytes() == Path(pack.path).read_bytes()
    assert_sound(str(tmp_path), [s.ref.digest for s in samples])


def test_facts_may_be_recorded_by_many_threads(tmp_path: Path) -> None:
    samples = [sample(f"t{n}") for n in range(40)]
    with Store.open(str(tmp_path), disk=UnsyncedDisk()) as store:

        def record(mine: list[int]) -> None:
            for n in mine:
                store.realise({samples[n].key: samples[n].ref})
                store.remember(samples[0].key, {samples[n].name: samples[n].ref.digest})

        threads = [threading.Thread(target=record, args=(list(range(n, 40, 4)),)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.realisations(s.key for s in samples) == {s.key: s.ref for s in samples}
        assert store.memos(samples[0].key) == {s.name: s.ref.digest for s in samples}


def test_abandoning_waits_for_a_write_that_is_under_way(tmp_path: Path) -> None:
    """Else the write could go to another file that was given the same number."""
    started, go_on = threading.Event(), threading.Event()

    class Slow(UnsyncedDisk):
        def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
            if offset > 0:
                started.set()
                go_on.wait(10)
            super().pwrite(fd, data, offset)

    with Store.open(str(tmp_path), disk=Slow()) as store:
        writer = store.write_pack((s.name, s.spec) for s in THREE)
        thread = threading.Thread(target=writer.write, args=("whole", 0, THREE[1].data))
        thread.start()
        assert started.wait(10)
        closing = threading.Thread(target=writer.abandon)
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
        go_on.set()
        closing.join(10)
        thread.join(10)
        assert not closing.is_alive()
        with pytest.raises(ValueError, match="the pack is closed"):
            writer.write("whole", 0, b"")


def test_a_pack_that_is_being_written_is_not_salvaged(tmp_path: Path) -> None:
    with Store.open(str(tmp_path)) as one, Store.open(str(tmp_path)) as two:
        with one.write_pack((s.name, s.spec) for s in THREE) as writer:
            fill(writer, THREE[:2])
            assert two.salvage().files == 0
            assert one.salvage().files == 0
            fill(writer, THREE[2:])
            writer.finish()
        assert two.pack(put_pack(two, THREE).digest)


def test_what_one_process_adopted_no_other_deletes(tmp_path: Path) -> None:
    with Store.open(str(tmp_path)) as one, Store.open(str(tmp_path)) as two:
        with one.write_pack((s.name, s.spec) for s in THREE) as writer:
            fill(writer, THREE)
        assert one.salvage().tensors == 3
        assert two.salvage().tensors == 0
        two.drop_salvaged()
        assert set(two.locations(s.ref.digest for s in THREE)) == {s.ref.digest for s in THREE}
        assert any(path.name.endswith(PART) for path in (tmp_path / "tmp").iterdir())


def test_one_publisher_for_each_output_folder(tmp_path: Path) -> None:
    order: list[str] = []
    with Store.open(str(tmp_path / "store")) as one, Store.open(str(tmp_path / "store")) as two:

        def second() -> None:
            with two.output_lock(str(tmp_path / "out" / ".." / "out")):
                order.append("second")

        with one.output_lock(str(tmp_path / "out")):
            thread = threading.Thread(target=second)
            thread.start()
            with two.output_lock(str(tmp_path / "elsewhere")):
                thread.join(0.1)
            order.append("first")
        thread.join(10)
    assert order == ["first", "second"]
