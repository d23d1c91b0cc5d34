"""Fail or die at each file operation of a whole build: a clean error, the old folder or the new one, then the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kittybuild import api
from kittybuild.errors import StoreError
from kittybuild.store.disk import Disk
from kittybuild.store.store import Store
from tests.building import contents
from tests.conftest import Counted
from tests.faults import Fault, FaultyDisk, Killed, assert_sound, quick_folder
from tests.helpers import noise, write_model, write_recipe

SHAPES = {"model.embed.weight": (16, 16), "model.layers.0.weight": (16, 16), "model.norm.weight": (16,)}
WRITING = ("create", "pwrite", "append", "copy_range", "makedirs", "link")
THEIRS = {"notes/eval.txt": b"91 %", "results.csv": b"a,b\n"}


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.fixture(scope="module")
def recipes(top: Path) -> dict[str, Path]:
    """Two recipes with two stages and two shards that differ in the last weight."""
    for seed, name in enumerate(("base", "happy")):
        tensors = {tensor: noise(seed, tensor, shape) for tensor, shape in SHAPES.items()}
        write_model(top / name, tensors, {"model_type": "pico", "torch_dtype": "float32"})
    found = {}
    for name, weight in (("old", 0.25), ("new", 0.75)):
        soup = [{"model": "base", "parameters": {"weight": 0.5}}, {"model": "happy", "parameters": {"weight": weight}}]
        form = {
            "kittybuild": 1,
            "sources": {source: {"path": str(top / source)} for source in ("base", "happy")},
            "stages": {
                "soup": {"merge_method": "linear", "models": soup},
                "bf16": {"merge_method": "passthrough", "models": [{"model": "soup"}], "dtype": "bfloat16"},
            },
            "outputs": {"bf16": {"folder": "place/out", "shard_size": "600"}},
        }
        found[name] = Path(write_recipe(top, form, f"{name}.yml"))
    return found


def run(recipe: Path, place: Path, disk: Disk | None = None) -> str:
    """Build into `place/out` with the store `place/store`; the manifest's digest."""
    prepared = api.prepare(api.read_recipe(str(recipe)), folder=str(place / "out"))
    with Store.open(str(place / "store"), disk=disk) as store:
        return api.build(prepared, store, processes=False).stages["bf16"].manifest.hex


class Before:
    """What there is when the build begins, and what there must be at its end."""

    def __init__(self, top: Path, recipes: dict[str, Path], *, update: bool) -> None:
        self.place, self.kept, self.recipe = top / "place", top / f"kept-{update}", recipes["new"]
        self.name = "publish, update" if update else "publish, first"
        self.old: dict[str, bytes] = {}
        if update:
            run(recipes["old"], self.kept)
            for name, data in THEIRS.items():
                (self.kept / "out" / name).parent.mkdir(exist_ok=True)
                (self.kept / "out" / name).write_bytes(data)
            self.old = contents(self.kept / "out")
        else:  # the making of a store has its own tests
            Store.open(str(self.kept / "store")).close()
        self.again()
        self.manifest = run(self.recipe, self.place)
        self.new = contents(self.place / "out")
        assert len([name for name in self.new if name.startswith("model-")]) == 2
        assert not update or THEIRS.items() <= self.new.items()

    def again(self) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.kept, self.place)
        return self.place

    def calls(self) -> list[str]:
        disk = FaultyDisk()
        run(self.recipe, self.again(), disk)
        return disk.calls

    def assert_recovers(self, what: str) -> None:
        """The folder is the old or the new one; the store is sound; the next build ends as if nothing had happened."""
        assert contents(self.place / "out") in (self.old, self.new), what
        assert_sound(str(self.place / "store"))
        assert run(self.recipe, self.place) == self.manifest, what
        assert contents(self.place / "out") == self.new, what
        assert sorted(path.name for path in self.place.iterdir()) == ["out", "store"], what
        assert not list((self.place / "store/tmp").iterdir()), what


@pytest.fixture(scope="module", params=["first", "update"])
def before(request: pytest.FixtureRequest, top: Path, recipes: dict[str, Path]) -> Before:
    return Before(top, recipes, update=request.param == "update")


def test_the_build_goes_through_the_disk(before: Before) -> None:
    calls = before.calls()
    assert {"create", "pwrite", "append", "fsync", "rename", "link", "sync_dir", "makedirs", "chmod"} <= set(calls)
    assert ("exchange" in calls) == bool(before.old)


def error_of(recipe: Path, place: Path, disk: Disk) -> StoreError | None:
    """What a build ends with; only an error of the store is a clean one here."""
    try:
        run(recipe, place, disk)
    except StoreError as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [(Fault.EIO, "KB705"), (Fault.ENOSPC, "KB704")])
def test_a_failure_at_any_operation_is_an_error_with_a_code(
    fault: Fault, code: str, before: Before, counted: Counted
) -> None:
    calls, faults = before.calls(), 0
    for n, name in enumerate(calls):
        if fault is Fault.ENOSPC and name not in WRITING:
            continue
        disk = FaultyDisk(n, fault)
        error = error_of(before.recipe, before.again(), disk)
        disk.bury()
        if error is None:
            assert disk.calls[n] == "exchange"  # then the folders are renamed one after the other
        else:
            assert (error.code, bool(error.at), bool(error.hint)) == (code, True, True), f"{n}: {name}: {error}"
        before.assert_recovers(f"{fault} at {n}: {name}")
        faults += 1
    counted(before.name, len(calls), faults)


@pytest.mark.slow
def test_death_at_any_operation(before: Before, counted: Counted) -> None:
    calls = before.calls()
    for n, name in enumerate(calls):
        disk = FaultyDisk(n, Fault.KILL)
        with pytest.raises(Killed):
            run(before.recipe, before.again(), disk)
        disk.bury()
        before.assert_recovers(f"death at {n}: {name}")
    counted(before.name, len(calls), len(calls))
