"""Fail, cut or die at each file operation and each request of a build that fetches: the model is right in the end.

What a cache does wrong is a miss: the build computes instead, and ends well. What the disk does wrong is an error with
a code, and the next build goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kittybuild import api
from kittybuild.digest import Digest
from kittybuild.errors import KittybuildError, StoreError
from kittybuild.executor.events import Silent
from kittybuild.planner.offers import ALWAYS, Offers
from kittybuild.publish.push import Pushing, open_to_push
from kittybuild.store.disk import Disk
from kittybuild.store.remote.bucket import Bucket, Retried
from kittybuild.store.remote.keys import SigningKey
from kittybuild.store.remote.objects import connect
from kittybuild.store.remote.substituters import Substituters, Trust
from kittybuild.store.store import Store
from tests.bucket_faults import FaultyBucket
from tests.building import contents
from tests.conftest import Counted
from tests.faults import Fault, FaultyDisk, Killed, UnsyncedDisk, assert_sound, quick_folder
from tests.helpers import noise, write_model, write_recipe

SHAPES = {"model.embed.weight": (16, 16), "model.layers.0.weight": (16, 16), "model.norm.weight": (16,)}
WRITING = ("create", "pwrite", "append", "copy_range", "makedirs", "link")
HALVES = ("pwrite", "append", "copy_range")
KEY = SigningKey.new("team-1")


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    """A machine with a recipe, its lock, its output, and a cache with all of it."""
    with quick_folder() as top:
        for seed, name in enumerate(("base", "happy")):
            tensors = {tensor: noise(seed, tensor, shape) for tensor, shape in SHAPES.items()}
            write_model(top / "first" / name, tensors, {"model_type": "pico", "torch_dtype": "float32"})
        models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "happy")]
        form = {
            "kittybuild": 1,
            "sources": {name: {"path": name} for name in ("base", "happy")},
            "stages": {"soup": {"merge_method": "linear", "models": models}},
            "outputs": {"soup": {"folder": "out"}},
        }
        recipe = write_recipe(top / "first", form)
        api.lock(api.read_recipe(recipe))
        assert run(top / "first") == (3, 0)
        assert push(top, top / "first", bucket(top)) > len(SHAPES)  # headers and small files of the sources too
        yield top


def bucket(top: Path, name: str = "cache") -> Bucket:
    """A cache in a folder, without the patience that a network needs."""
    found = connect(str(top / name))
    assert isinstance(found, Retried)
    return found.inner


def run(place: Path, cache: Bucket | None = None, disk: Disk | None = None) -> tuple[int, int]:
    """Build, and fetch all that the cache has; how many tensors were computed and fetched."""
    offers = Offers(Substituters([cache], Trust((KEY.public,)), lambda text: None), ALWAYS) if cache else None
    prepared = api.prepare(api.read_recipe(str(place / "recipe.yml")), caches=cache is not None)
    with Store.open(str(place / "store"), disk=disk or UnsyncedDisk()) as store:
        stages = api.build(prepared, store, processes=False, offers=offers).stages
    return sum(stage.computed for stage in stages.values()), sum(stage.fetched for stage in stages.values())


def push(top: Path, place: Path, cache: Bucket, disk: Disk | None = None) -> int:
    """Push what was built on the first machine from (a copy of) its store; how many blobs were sent."""
    prepared = api.prepare(api.read_recipe(str(top / "first/recipe.yml")))
    with Store.open(str(place / "store"), disk=disk or UnsyncedDisk()) as store:
        return api.push(prepared, store, Pushing(open_to_push(cache), KEY, Silent())).blobs


class Fetching:
    """A second machine, whose build fetches: with the weights, of which one blob is lost, or without any source."""

    def __init__(self, top: Path, *, weights: bool) -> None:
        self.top, self.place, self.kept = top, top / "second", top / f"kept-{weights}"
        self.name, self.expected = ("fetch", (1, 2)) if weights else ("fetch, no sources", (0, 3))
        shutil.copytree(top / "first", self.kept, ignore=shutil.ignore_patterns("store", "out", *self.missing(weights)))
        Store.open(str(self.kept / "store")).close()
        shutil.copytree(top / "cache", top / f"cache-{weights}")
        self.cache = bucket(top, f"cache-{weights}")
        if weights:
            with Store.open(str(top / "first/store"), disk=UnsyncedDisk()) as store:
                (root,) = store.roots()
                manifest = store.manifest(root.manifest)
                assert manifest is not None
                lost = manifest.tensors[0].ref.digest.hex
            (top / f"cache-{weights}/cas" / lost[:2] / lost).unlink()
        assert run(self.again(), self.cache) == self.expected
        self.new, first = contents(self.place / "out"), contents(top / "first/out")
        del first["kittybuild.json"]  # which tells of sources what this machine knows of them
        assert first.items() <= self.new.items()

    def missing(self, weights: bool) -> tuple[str, ...]:
        return () if weights else ("base", "happy")

    def again(self) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.kept, self.place)
        return self.place

    def assert_right(self, what: str) -> None:
        """The next build with a sound cache makes the model, and nothing else is left."""
        assert contents(self.place / "out") in ({}, self.new), what
        assert_sound(str(self.place / "store"))
        run(self.place, self.cache)
        assert contents(self.place / "out") == self.new, what
        assert not list((self.place / "store/tmp").iterdir()), what


@pytest.fixture(scope="module", params=[True, False], ids=["weights", "no sources"])
def fetching(request: pytest.FixtureRequest, top: Path) -> Fetching:
    return Fetching(top, weights=request.param)


def outcome(place: Path, cache: Bucket, disk: Disk) -> KittybuildError | tuple[int, int]:
    try:
        return run(place, cache, disk)
    except KittybuildError as error:
        return error


def calls_of(fetching: Fetching) -> tuple[list[str], list[str]]:
    """The file operations and the requests of an undisturbed build."""
    disk, asked = FaultyDisk(), FaultyBucket(fetching.cache)
    assert run(fetching.again(), asked, disk) == fetching.expected
    assert contents(fetching.place / "out") == fetching.new
    return disk.calls, asked.calls


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC, Fault.SHORT])
def test_a_failing_disk_is_an_error_with_a_code(fault: Fault, fetching: Fetching, counted: Counted) -> None:
    codes = {Fault.ENOSPC: "KB704"}
    calls, _ = calls_of(fetching)
    faults = 0
    for n, name in enumerate(calls):
        if name not in {Fault.ENOSPC: WRITING, Fault.SHORT: HALVES}.get(fault, calls):
            continue
        disk = FaultyDisk(n, fault)
        error = outcome(fetching.again(), fetching.cache, disk)
        disk.bury()
        assert isinstance(error, StoreError), f"{fault} at {n}: {name}: {error}"
        assert (error.code, bool(error.at), bool(error.hint)) == (codes.get(fault, "KB705"), True, True), f"{n}: {name}"
        fetching.assert_right(f"{fault} at {n}: {name}")
        faults += 1
    counted(fetching.name, len(calls), faults)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.KILL, Fault.TORN])
def test_death_at_any_file_operation(fault: Fault, fetching: Fetching, counted: Counted) -> None:
    calls, _ = calls_of(fetching)
    faults = 0
    for n, name in enumerate(calls):
        if fault is Fault.TORN and name not in HALVES:
            continue
        disk = FaultyDisk(n, fault)
        with pytest.raises(Killed):
            run(fetching.again(), fetching.cache, disk)
        disk.bury()
        fetching.assert_right(f"{fault} at {n}: {name}")
        faults += 1
    counted(fetching.name, len(calls), faults)


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.SHORT, Fault.EXIT, Fault.KILL])
def test_a_failing_cache_is_a_miss(fault: Fault, fetching: Fetching, counted: Counted) -> None:
    """Only where the sources are not here, nothing can take its place."""
    _, requests = calls_of(fetching)
    for n, name in enumerate(requests):
        asked, disk = FaultyBucket(fetching.cache, n, fault), FaultyDisk()
        what = f"{fault} at {n}: {name}"
        if fault is Fault.KILL:
            with pytest.raises(Killed):
                run(fetching.again(), asked, disk)
            disk.bury()
        else:
            found = outcome(fetching.again(), asked, disk)
            if isinstance(found, KittybuildError):
                assert (found.code, fetching.expected) == ("KB260", (0, 3)), what
            else:
                assert sum(found) == 3, what
                assert contents(fetching.place / "out") == fetching.new, what
        fetching.assert_right(what)
    counted(f"{fetching.name}: requests", len(requests), len(requests))


class Pushes:
    """A push into an empty cache."""

    def __init__(self, top: Path) -> None:
        self.top, self.place, self.cache = top, top / "pusher", top / "pushed"
        push(top, self.again(), bucket(top, "pushed"))
        self.whole = contents(self.cache)

    def again(self) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.copytree(self.top / "first/store", self.place / "store")
        return self.place

    def assert_recovers(self, what: str) -> None:
        """No claim leads to what is not there, and the next push completes the cache."""
        there = contents(self.cache)
        if any(name.startswith(("traces", "stages", "sources")) for name in there):
            assert {name: data for name, data in self.whole.items() if name.startswith("cas")}.items() <= there.items()
        assert_sound(str(self.place / "store"))
        push(self.top, self.place, bucket(self.top, "pushed"))
        assert contents(self.cache) == self.whole, what


@pytest.fixture(scope="module")
def pushes(top: Path) -> Pushes:
    return Pushes(top)


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC, Fault.SHORT, Fault.EXIT, Fault.KILL, Fault.TORN])
def test_a_push_that_fails_at_any_request(fault: Fault, pushes: Pushes, top: Path, counted: Counted) -> None:
    asked = FaultyBucket(bucket(top, "pushed"))
    push(top, pushes.again(), asked)
    faults = 0
    for n, name in enumerate(asked.calls):
        if fault in (Fault.ENOSPC, Fault.SHORT, Fault.TORN) and name != "put":
            continue
        place, failing = pushes.again(), FaultyBucket(bucket(top, "pushed"), n, fault)
        if fault in (Fault.KILL, Fault.TORN):
            with pytest.raises(Killed):
                push(top, place, failing)
        else:
            with pytest.raises(KittybuildError) as caught:
                push(top, place, failing)
            assert (caught.value.code, bool(caught.value.hint)) == ("KB802", True), f"{fault} at {n}: {name}"
        pushes.assert_recovers(f"{fault} at {n}: {name}")
        faults += 1
    counted("push: requests", len(asked.calls), faults)


@pytest.mark.parametrize("fault", [Fault.EIO, Fault.KILL])
def test_a_push_from_a_failing_store(fault: Fault, pushes: Pushes, top: Path, counted: Counted) -> None:
    disk = FaultyDisk()
    push(top, pushes.again(), bucket(top, "pushed"), disk)
    for n, name in enumerate(disk.calls):
        place, failing = pushes.again(), FaultyDisk(n, fault)
        with pytest.raises((StoreError, Killed)):
            push(top, place, bucket(top, "pushed"), failing)
        failing.bury()
        pushes.assert_recovers(f"{fault} at {n}: {name}")
    counted("push", len(disk.calls), len(disk.calls))


def test_what_is_pushed_after_all_is_what_is_fetched(pushes: Pushes, top: Path) -> None:
    """A cache of which every object was cut is complete again after a push."""
    push(top, pushes.again(), bucket(top, "pushed"))
    for path in [path for path in pushes.cache.rglob("*") if path.is_file()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    push(top, pushes.place, bucket(top, "pushed"))
    assert contents(pushes.cache) == pushes.whole
    assert all(Digest.of(data).hex == name[-64:] for name, data in pushes.whole.items() if name.startswith("cas"))
