"""Caches on real servers: pushed to from one machine, built from on another that has no weights; and with bad lines."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kittybuild.store.remote.gc import DAY, collect, plan_gc
from kittybuild.store.remote.objects import connect
from tests.caches import Machine, counts, machine, signer
from tests.helpers import run_cli
from tests.servers import Spoil, azurite, gcs, moto, nginx, proxy, rclone


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    found = machine(tmp_path_factory.mktemp("one"), layers=2)
    found.build()
    return found


@contextmanager
def server(kind: str, folder: Path) -> Iterator[str]:
    folder.mkdir()
    match kind:
        case "moto":
            with moto() as url:
                yield url
        case "gcs":
            with gcs() as url:
                yield url
        case "azurite":
            with azurite() as url:
                yield url
        case "nginx":
            with nginx(folder) as url:
                yield url
        case "rclone":
            with rclone(folder) as url:
                yield url
        case _:
            yield folder.as_uri()


def same(one: Machine, two: Machine) -> bool:
    names = ("soup", "copy")
    return all(
        (one.out / name / "model.safetensors").read_bytes() == (two.out / name / "model.safetensors").read_bytes()
        for name in names
    )


@pytest.mark.parametrize("kind", ["folder", "moto", "gcs", "azurite", "nginx", "rclone"])
def test_pushed_from_one_machine_and_built_on_another_without_weights(one: Machine, tmp_path: Path, kind: str) -> None:
    key, public = signer(tmp_path, "team-1")
    with server(kind, tmp_path / "server") as url:
        first = one.push(url, key)
        assert first["blobs"] > 30
        assert one.push(url, key)["blobs"] == 0
        two = one.like(tmp_path / "two", weights=False)
        document = two.build("--substituter", url, "--trust", public)
        assert run_cli("cache", "info", url)[1]["blobs"] == first["blobs"]
        assert run_cli("cache", "gc", url)[1]["delete"] == [], "all is young, and a root keeps it"
        assert len(run_cli("cache", "roots", url, "--drop", "recipe")[1]["dropped"]) == 1
        bucket = connect(url)
        assert len(collect(bucket, plan_gc(bucket, -DAY))) > first["blobs"], "as in a day from now"
        assert run_cli("cache", "info", url)[1]["blobs"] == 0
    assert counts(document) == (0, 21)
    assert counts(document, "copy") == (0, 21)
    assert document["bytes"]["read"] == 0
    assert same(one, two)


def cuts(number: int, path: str, data: bytes) -> bytes | int | None:
    return data[: len(data) // 2] if number % 4 == 1 else None


def fails(number: int, path: str, data: bytes) -> bytes | int | None:
    return 500 if number % 3 == 1 else None


def delays(number: int, path: str, data: bytes) -> bytes | int | None:
    time.sleep(0.02)
    return None


def flips(number: int, path: str, data: bytes) -> bytes | int | None:
    if "/cas/" not in path or number % 5:
        return None
    at = random.Random(number).randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("spoil", [cuts, fails, delays, flips])
def test_a_bad_line_makes_a_build_slower_and_never_wrong(one: Machine, tmp_path: Path, spoil: Spoil) -> None:
    key, public = signer(tmp_path, "team-1")
    with server("nginx", tmp_path / "server") as url:
        one.push(url, key)
        two = one.like(tmp_path / "two", weights=True)
        with proxy(url, spoil) as bad:
            document = two.build("--substituter", bad, "--trust", public, "--fetch", "always")
    computed, fetched = counts(document)
    assert computed + fetched == 21
    assert (computed > 0) == (spoil is flips), "only what is wrong is computed: the rest is asked for again"
    assert same(one, two)


def test_nobody_there_is_a_note(one: Machine, tmp_path: Path) -> None:
    _, public = signer(tmp_path, "team-1")
    two = one.like(tmp_path / "two", weights=True)
    document = two.build("--substituter", "http://127.0.0.1:9/cache", "--trust", public)
    assert counts(document) == (21, 0)
    assert same(one, two)
