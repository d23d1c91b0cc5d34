"""Worker processes: the same bits as threads, errors that arrive whole, and nothing left behind when somebody dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kittybuild.builders.registry import BUILTIN
from kittybuild.checkpoint.source import Entry
from kittybuild.errors import BuildError, SourceError
from kittybuild.executor.order import Given, Order, Report, Slot
from kittybuild.executor.workers import Processes, Threads
from kittybuild.model.derivation import Derivation, SourceTensor
from kittybuild.store.disk import Disk
from kittybuild.tensors import DType, TensorSpec
from tests.building import ROOT, build, linear, manifest_of, packs
from tests.helpers import pico_llama

PROCESSES = {"KITTYBUILD_WORKERS": "processes"}
LARGE = TensorSpec(DType.F32, (1024, 16384))


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pico models."""
    folder = tmp_path_factory.mktemp("siblings")
    pico_llama(folder / "a", 1, width=64, vocab=3001)
    pico_llama(folder / "b", 2, base=folder / "a")
    return folder


@pytest.fixture(scope="module")
def recipe(siblings: Path) -> str:
    """A soup of them."""
    return linear(siblings, {"a": 0.4, "b": 0.7})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A file of zeros, large enough that averaging it takes a while."""
    (tmp_path / "zeros").write_bytes(b"")
    os.truncate(tmp_path / "zeros", LARGE.nbytes)
    return tmp_path


def order(place: Path, name: str = "x", spec: TensorSpec = LARGE) -> Order:
    """The mean of the file with itself, many times over."""
    entry = Entry("x", spec, str(place / "zeros"), 0, spec.nbytes)
    inputs = (SourceTensor("zeros", "x", spec),) * 8
    drv = Derivation("linear", 1, {"weight": [0.5] * 8, "normalize": True}, inputs, spec)
    slot = Slot(str(place / "out"), 0)
    return Order(name, drv, (Given(spec, entry=entry),) * 8, 1 << 30, slot)


@pytest.fixture
def out(place: Path) -> Path:
    """The file that orders write to."""
    (place / "out").write_bytes(b"\xff" * LARGE.nbytes)
    return place / "out"


@pytest.fixture
def workers() -> Iterator[Processes]:
    """Two worker processes, ready."""
    with Processes(2, BUILTIN, Disk()) as ready:
        ready.start(torch=False)
        yield ready


def test_processes_and_threads_make_the_same(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_threads = build(recipe, "-o", tmp_path / "a", "--store", tmp_path / "s", "--workers", "threads")
    made = packs(tmp_path / "s")
    for jobs in ("1", "3"):
        args = ("-o", tmp_path / f"b{jobs}", "--store", tmp_path / f"s{jobs}", "--jobs", jobs)
        by_processes = build(recipe, *args, "--workers", "processes")
        assert manifest_of(by_processes) == manifest_of(by_threads)
        assert packs(tmp_path / f"s{jobs}") == made
        assert by_processes["bytes"] == by_threads["bytes"]
        assert by_processes["peak_rss"] > by_threads["peak_rss"] / 10


def test_an_order_gives_the_same_report_from_a_process_and_a_thread(place: Path, out: Path, workers: Processes) -> None:
    with Threads(1, BUILTIN, Disk()) as threads:
        here, data = threads.run(order(place)), out.read_bytes()
    assert data == bytes(LARGE.nbytes)
    out.write_bytes(b"\xff" * LARGE.nbytes)
    there = workers.run(order(place))
    assert there == here
    assert isinstance(there, Report)
    assert out.read_bytes() == data
    assert workers.bytes_read == threads.bytes_read == 8 * LARGE.nbytes
    assert workers.peak_memory > 1_000_000


def test_a_chain_that_is_made_in_memory_holds_two_of_its_tensors_at_a_time(place: Path, out: Path) -> None:
    spec = TensorSpec(DType.F32, (256, 4096))
    source = Given(spec, entry=Entry("x", spec, str(place / "zeros"), 0, spec.nbytes))
    drv = Derivation("linear", 1, {"weight": [1.0], "normalize": True}, (SourceTensor("zeros", "x", spec),), spec)
    chain = source
    for number in range(20):
        chain = Given(spec, first=Order(f"x{number}", drv, (chain,), 1 << 20))
    with Threads(1, BUILTIN, Disk()) as threads:
        tracemalloc.start()
        threads.run(Order("x", drv, (chain,), 1 << 20, Slot(str(out), 0)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert 2 * spec.nbytes <= peak < 4 * spec.nbytes


def test_an_error_arrives_as_it_was_raised_and_the_worker_goes_on(place: Path, out: Path, workers: Processes) -> None:
    os.truncate(place / "zeros", LARGE.nbytes - 4)
    for _ in range(3):  # more often than there are workers
        with pytest.raises(SourceError) as caught:
            workers.run(order(place, "the tensor"))
        assert (caught.value.code, caught.value.at) == ("KB202", str(place / "zeros"))
        assert "4 bytes too early" in caught.value.message
        assert caught.value.hint
    os.truncate(place / "zeros", LARGE.nbytes)
    assert isinstance(workers.run(order(place)), Report)


def test_forgotten_files_are_opened_anew(place: Path, out: Path, workers: Processes) -> None:
    small = TensorSpec(DType.F32, (4,))
    before = workers.run(order(place, spec=small))
    os.replace(place / "zeros", place / "older")
    (place / "zeros").write_bytes(b"\x00\x00\x80\x3f" * 4)
    assert {workers.run(order(place, spec=small)).ref for _ in range(4)} >= {before.ref}
    workers.forget_files()
    assert before.ref not in {workers.run(order(place, spec=small)).ref for _ in range(4)}


@pytest.mark.parametrize("ending", [lambda w: w.interrupt(), lambda w: os.kill(w._server.pid, signal.SIGTERM)])
def test_when_the_server_ends_its_workers_end_and_orders_fail(
    ending: Callable[[Processes], None], place: Path, out: Path
) -> None:
    with Processes(2, BUILTIN, Disk()) as workers:
        workers.start(torch=False)
        workers.run(order(place))
        ending(workers)
        assert workers._server
        workers._server.wait(20)
        with pytest.raises(BuildError) as caught:
            workers.run(order(place, "the tensor"))
        assert (caught.value.code, caught.value.at) == ("KB507", "the tensor")
        assert caught.value.hint


def children(pid: int) -> list[int]:
    """The processes that descend from one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(stat[1]) == pid and stat[0] != "Z":
                found += [int(entry.name), *children(int(entry.name))]
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_build_leaves_no_process_behind(place: Path, out: Path) -> None:
    text = "import sys; from tests.e2e.test_workers import hold; hold(sys.argv[1])"
    holder = subprocess.Popen(
        [sys.executable, "-c", text, str(place)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n"
    processes = children(holder.pid)
    assert len(processes) == 3  # the server and two workers
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/exe").exists() for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def hold(place: str) -> None:
    """Keep workers busy until somebody ends this process."""
    with Processes(2, BUILTIN, Disk()) as workers:
        workers.start(torch=False)
        workers.run(order(Path(place)))
        print("ready", flush=True)
        while True:
            workers.run(order(Path(place)))


def test_a_build_imports_no_torch(recipe: str, tmp_path: Path) -> None:
    """Neither in its own process nor in its workers: `torch` there would be an error."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('somebody imports torch')", encoding="utf-8")
    env = {**os.environ, **PROCESSES, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "kittybuild", "build", recipe, "-o", str(tmp_path / "o")]
    done = subprocess.run([*command, "--store", str(tmp_path / "s")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
