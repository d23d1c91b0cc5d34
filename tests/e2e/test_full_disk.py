"""A disk that is full to the brim: a clean error, nothing lost, room can be made, and the next build goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.building import build, contents, fails, linear, packs
from tests.faults import assert_sound
from tests.helpers import pico_llama, run_cli
from tests.mounts import fill, small_disk

SIZE = 40 << 20
ROOMS = (0, 4096, 20_000, 60_000, 200_000, 1_000_000, 2_000_000)
"""Bytes that are left on the disk: what fails is another step each time."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two siblings of 2.6 MB."""
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "base", 0, width=128, vocab=4096)
    pico_llama(folder / "happy", 1, base=folder / "base")
    return folder


@pytest.fixture(params=["tmpfs", "ext4-4096", "ext4-1024"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    with small_disk(tmp_path / "disk", request.param, SIZE) as disk:
        yield disk


def recipe(models: Path, folder: Path, weight: float) -> str:
    return linear(folder, {models / "base": 0.5, models / "happy": weight}, f"{weight}.yml")


def test_a_disk_that_is_full_to_the_brim(disk: Path, models: Path, tmp_path: Path) -> None:
    out, store = disk / "out", disk / "store"
    args = ("-o", out, "--store", store)
    for weight in (0.1, 0.2, 0.3):  # the packs of the first two are what can be deleted
        build(recipe(models, tmp_path, weight), *args)
    old = contents(out)
    new = recipe(models, tmp_path, 0.4)
    for room in ROOMS:
        fill(disk, room)
        status, code, error = fails(new, *args)
        assert (status, code, bool(error["at"])) == (7, "KB704", True), f"{room}: {error}"
        assert "--store" in error["hint"]
        assert contents(out) == old
        (disk / "ballast").unlink()
        assert_sound(str(store))
    fill(disk)
    assert run_cli("store", "check", "--store", store, "--full")[0] in (0, 7)
    status, answer = run_cli("store", "gc", "--store", store)
    assert (status, answer["ok"]) == (0, True), answer
    assert answer["freed"] > 5_000_000
    assert len(packs(store)) == 1
    answer = build(new, *args)
    assert_sound(str(store))
    build(new, "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert contents(out) == contents(tmp_path / "out")
    (disk / "ballast").unlink()
    assert run_cli("store", "gc", "--store", store)[0] == 0
    assert os.path.getsize(store / "reserve") == 8 << 20
    assert contents(out) == contents(tmp_path / "out")


def test_a_store_cannot_begin_on_a_full_disk_and_can_when_there_is_room(
    disk: Path, models: Path, tmp_path: Path
) -> None:
    args = (recipe(models, tmp_path, 0.4), "-o", tmp_path / "out", "--store", disk / "store")
    for room in ROOMS:
        fill(disk, room)
        status, code, error = fails(*args)
        assert (status, code) == (7, "KB704"), f"{room}: {error}"
        assert not (tmp_path / "out").exists()
        (disk / "ballast").unlink()
    assert build(*args)["outputs"]["merge"]["shards_written"] == 1
