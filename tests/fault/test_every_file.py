"""A flipped bit, or a cut, in a file of every kind that the format names, and in what lies beside a store.

Found by check where something relies on it, repaired, and the next build is right.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from kittybuild.store.remote.names import CAS, INFO, KINDS, ROOTS
from kittybuild.store.store import Store
from tests.building import ROOT, contents
from tests.caches import Machine, counts, machine, signer
from tests.faults import THREE, UnsyncedDisk, assert_sound, fill, quick_folder
from tests.helpers import run_cli

# What check finds. The others are verified by whoever uses them: nothing else relies on them.
FOUND = {"packs": "pack", "files": "file", "manifests": "manifest", "roots": "root", "reserve": "reserve"}
DOCUMENT = (ROOT / "store/FORMAT.md").read_text(encoding="utf-8")
NAMED = re.findall(r"^([A-Za-z]+)(?:/\S*)?  +\S", DOCUMENT.split("```")[1], re.MULTILINE)


class World:
    """A machine that has fetched all that it built from a cache, without its sources; and an interrupted pack."""

    def __init__(self, top: Path) -> None:
        self.top, self.kept, self.cache = top, top / "kept", top / "cache"
        key, public = signer(top, "team-1")
        self.first = machine(top / "first")
        self.first.build()
        self.first.push(self.cache, key)
        self.ask = ("--substituter", str(self.cache), "--trust", public, "--fetch", "always")
        self.second = self.first.like(top / "second", weights=False)
        shutil.rmtree(self.second.folder / "models")
        self.second.build(*self.ask)
        with Store.open(str(self.second.store), disk=UnsyncedDisk()) as store:
            with store.write_pack((s.name, s.spec) for s in THREE) as writer:
                fill(writer, THREE[:2])
            assert store.leases.take(THREE[0].ref.digest)
        with sqlite3.connect(self.second.store / "index/cache.db") as base:  # all of it in one file
            base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        base.close()
        shutil.copytree(self.second.folder, self.kept)
        self.whole = contents(self.second.out)

    def again(self) -> Machine:
        shutil.rmtree(self.second.folder)
        shutil.copytree(self.kept, self.second.folder)
        return self.second

    def files(self, kind: str) -> list[str]:
        """The files of a kind, by their path in the store; of many the first, one in the middle and the last."""
        top = self.kept / "store"
        found = sorted(path for path in (top / kind).rglob("*") if path.is_file()) or [top / kind]
        found = [path for path in found if path.name != "cache.db-shm"]  # which no program that starts believes
        chosen = {found[0], found[len(found) // 2], found[-1]}
        return sorted(str(path.relative_to(top)) for path in chosen)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with quick_folder() as top:
        yield World(top)


def harmed(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[: len(data) // 2]
    at = len(data) * 2 // 3
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :] if data else b"\x10"


def harm(path: Path, how: str) -> bool:
    """In place, as a bad disk would; whether the file is another one now."""
    data = path.read_bytes()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(harmed(data, how))
        file.truncate()
    return path.read_bytes() != data


def test_the_format_names_these_kinds_of_files(world: World) -> None:
    there = {path.name for path in (world.kept / "store").iterdir()}
    assert there == set(NAMED)
    assert set(FOUND) < set(NAMED)
    assert all((world.kept / "store" / name).is_file() for kind in NAMED for name in world.files(kind))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.parametrize("kind", NAMED)
def test_damage_to_any_file_of_a_store(kind: str, how: str, world: World) -> None:
    for name in world.files(kind):
        place, changed = world.again(), harm(world.second.store / name, how)
        status, answer = run_cli("store", "check", "--store", place.store, "--full")
        if kind == "FORMAT":
            assert (status, answer["errors"][0]["code"]) == (7, "KB702")
        elif kind in FOUND and changed and (kind, how) != ("reserve", "flip"):
            assert (status, answer["errors"][0]["code"]) == (7, "KB706"), name
            assert {damage["kind"] for damage in answer["damage"]} == {FOUND[kind]}, name
            assert str(place.store / name) in {damage["path"] for damage in answer["damage"]}
        status, answer = run_cli("store", "repair", "--store", place.store)
        assert status in (0, 7), answer  # 7: no source is here, to build from
        if kind in ("views", "tmp"):  # a build with nothing to do reads neither
            shutil.rmtree(place.store / "index")
        place.build(*world.ask)
        assert contents(place.out) == world.whole, name
        status, answer = run_cli("store", "check", "--store", place.store, "--full")
        assert (status, answer["damage"]) == (0, []), f"{name}: {answer}"
        assert_sound(str(place.store))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.parametrize("kind", [CAS, *KINDS, ROOTS, INFO])
def test_damage_to_any_file_of_a_cache_is_a_miss(kind: str, how: str, world: World, tmp_path: Path) -> None:
    cache = shutil.copytree(world.cache, tmp_path / "cache")
    for path in [*(cache / kind).rglob("*"), cache / kind]:
        if path.is_file():
            assert harm(path, how)
    three = world.first.like(tmp_path / "three", weights=True)
    answer = three.build("--substituter", cache, *world.ask[2:])
    assert sum(counts(answer)) == 12
    for name, data in contents(world.first.out).items():
        if name.endswith(".safetensors"):
            assert (three.out / name).read_bytes() == data


@pytest.mark.parametrize("name", ["recipe.lock", "kittybuild.yml"])
def test_damage_to_lock_and_settings_is_an_error_or_makes_no_difference(name: str, world: World) -> None:
    place = world.again()
    (place.folder / "kittybuild.yml").write_text(json.dumps({"store": "store", "trusted": [world.ask[3]]}))
    path = place.folder / name
    data = path.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 25)):
        for bad in (data[:at], data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]):
            path.write_bytes(bad)
            status, answer = run_cli("plan", place.recipe)  # a crash of ours is raised
            assert (status == 0) == answer["ok"]
            assert answer["ok"] or all(error["code"] and error["message"] for error in answer["errors"]), at
