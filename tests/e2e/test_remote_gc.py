"""Collection in a cache: what a push keeps stays, what was put lately stays, the rest goes; and pushes meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kittybuild.errors import RemoteError
from kittybuild.store.remote.bucket import Bucket, Listed, Piece, Unreachable
from kittybuild.store.remote.gc import DAY, collect, plan_gc
from kittybuild.store.remote.objects import connect
from tests.building import contents
from tests.caches import Machine, counts, machine, signer
from tests.helpers import run_cli

WEEK = 7 * DAY


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine that built everything."""
    found = machine(tmp_path_factory.mktemp("one"))
    found.build()
    return found


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return signer(tmp_path_factory.mktemp("keys"), "team-1")


def aged(cache: Path, days: float = 30) -> None:
    """Everything in a cache was put so long ago."""
    for path in cache.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - days * DAY,) * 2)


def gc(cache: Path, *args: str) -> dict[str, Any]:
    status, document = run_cli("cache", "gc", cache, *args)
    assert status == 0, document
    return document


def names(cache: Path) -> set[str]:
    return set(contents(cache))


def changed(one: Machine, folder: Path) -> Machine:
    """Another state of the same recipe, built: other tensors in `soup`, the same in `copy`."""
    other = one.like(folder, weights=True)
    recipe = Path(other.recipe)
    recipe.write_text(recipe.read_text().replace("weight: 0.5", "weight: 0.25", 1))
    other.build()
    return other


def test_what_a_push_keeps_stays_and_serves(one: Machine, key: tuple[Path, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one.push(cache, key[0])
    before = contents(cache)
    aged(cache)
    document = gc(cache)
    assert (document["delete"], document["roots"]) == ([], 1)
    assert contents(cache) == before
    two = one.like(tmp_path / "two", weights=False)
    assert counts(two.build("--substituter", cache, "--trust", key[1])) == (0, 12)


def test_another_push_of_the_name_lets_go_what_only_the_former_kept(
    one: Machine, key: tuple[Path, str], tmp_path: Path
) -> None:
    cache, fresh = tmp_path / "cache", tmp_path / "fresh"
    one.push(cache, key[0])
    aged(cache)
    other = changed(one, tmp_path / "other")
    assert other.push(cache, key[0])["there"] > 0, "what the former root keeps is not sent again"
    other.push(fresh, key[0])
    assert gc(cache)["freed"] > 0
    assert names(cache) == names(fresh), "what is left is what one push alone would have made"


def test_a_dry_run_only_says_what_would_go(one: Machine, key: tuple[Path, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one.push(cache, key[0])
    aged(cache)
    status, document = run_cli("cache", "roots", cache, "--drop", "recipe")
    assert (status, document["roots"], document["dropped"]) == (0, [], [{"name": "recipe", "signer": "team-1"}])
    before = names(cache)
    said = gc(cache, "--dry-run")
    assert names(cache) == before
    assert gc(cache)["delete"] == said["delete"]
    assert names(cache) == {"kittybuild-cache.json"}
    assert len(said["delete"]) == len(before) - 1


def test_names_and_signers_keep_apart(one: Machine, key: tuple[Path, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    second, _ = signer(tmp_path, "other-1")
    one.push(cache, key[0], "--as", "main")
    one.push(cache, second, "--as", "main")
    one.push(cache, key[0], "--as", "branch")
    kept = {(root["name"], root["signer"]) for root in run_cli("cache", "roots", cache)[1]["roots"]}
    assert kept == {("main", "team-1"), ("main", "other-1"), ("branch", "team-1")}
    run_cli("cache", "roots", cache, "--drop", "main", "--signer", "team-1")
    aged(cache)
    assert gc(cache)["delete"] == [], "branch needs the same"
    run_cli("cache", "roots", cache, "--drop", "branch")
    gone = {row["object"] for row in gc(cache)["delete"]}
    assert gone
    assert all(name.endswith("/team-1.json") for name in gone), "blobs are still needed by other-1"
    status, document = run_cli("cache", "roots", cache, "--drop", "branch")
    assert (status, document["errors"][0]["code"]) == (2, "KB012")


def test_what_was_put_lately_stays(one: Machine, key: tuple[Path, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one.push(cache, key[0])
    run_cli("cache", "roots", cache, "--drop", "recipe")
    aged(cache, 6)
    assert gc(cache)["delete"] == []
    assert gc(cache, "--older-than", "5d")["freed"] > 0
    assert run_cli("cache", "gc", cache, "--older-than", "1h")[0] == 2, "no push is safe from that"


def test_what_is_not_ours_stays(one: Machine, key: tuple[Path, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one.push(cache, key[0])
    run_cli("cache", "roots", cache, "--drop", "recipe")
    for name in ("notes.txt", "cas/ab/mine", "traces/x", f"cas/ab/{'0' * 64}.mine"):
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_text("mine")
    aged(cache)
    gc(cache)
    assert names(cache) == {
        "kittybuild-cache.json", "notes.txt", "cas/ab/mine", "traces/x", f"cas/ab/{'0' * 64}.mine"
    }  # fmt: skip


def test_a_root_that_cannot_be_read_stops(one: Machine, key: tuple[Path, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one.push(cache, key[0])
    aged(cache)
    (root,) = cache.glob("roots/*/*")
    for text in ("", "{}", root.read_text().replace('"name":"recipe"', '"name":"other"')):
        root.write_text(text)
        status, document = run_cli("cache", "gc", cache)
        assert (status, document["errors"][0]["code"]) == (8, "KB809")
    one.push(cache, key[0])
    assert gc(cache)["delete"] == []


class Meanwhile:
    """A bucket in which something happens at the first call of a kind, while all others wait."""

    def __init__(self, inner: Bucket, happens: Any, on: str) -> None:
        self.inner, self.happens, self.on, self.where = inner, happens, on, inner.where
        self.lock = threading.Lock()

    def _now(self, what: str) -> None:
        with self.lock:
            if what == self.on and self.happens:
                happens, self.happens = self.happens, None
                happens()

    def read(self, name: str, start: int = 0, length: int = 8 << 20) -> Piece | None:
        return self.inner.read(name, start, length)

    def put(self, name: str, data: memoryview) -> None:
        self.inner.put(name, data)

    def head(self, name: str) -> Listed | None:
        self._now("head")
        return self.inner.head(name)

    def list(self, folder: str) -> Iterator[Listed]:
        self._now(f"list {folder}")
        return self.inner.list(folder)

    def delete(self, name: str) -> None:
        self.inner.delete(name)


@pytest.mark.parametrize("on", ["list roots", "list cas", "head"])
def test_a_push_while_it_is_collected_loses_nothing(
    one: Machine, key: tuple[Path, str], tmp_path: Path, on: str
) -> None:
    cache = tmp_path / "cache"
    one.push(cache, key[0])
    run_cli("cache", "roots", cache, "--drop", "recipe")
    aged(cache)
    bucket = Meanwhile(connect(str(cache)), lambda: one.push(cache, key[0]), on)
    collect(bucket, plan_gc(bucket, WEEK))
    two = one.like(tmp_path / "two", weights=False)
    assert counts(two.build("--substituter", cache, "--trust", key[1])) == (0, 12)


def test_what_is_old_and_no_roots_is_sent_again(one: Machine, key: tuple[Path, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = one.push(cache, key[0])
    run_cli("cache", "roots", cache, "--drop", "recipe")
    assert one.push(cache, key[0], "--as", "young")["blobs"] == 0
    run_cli("cache", "roots", cache, "--drop", "young")
    aged(cache)
    assert one.push(cache, key[0], "--as", "old")["blobs"] == first["blobs"]
    aged(cache)
    assert one.push(cache, key[0], "--as", "other")["blobs"] == 0, "another root keeps it"


class NoList:
    """A server that cannot list, as plain HTTP."""

    where = "http://plain"

    def list(self, folder: str) -> Iterator[Listed]:
        raise Unreachable("405")


def test_a_server_that_cannot_list_is_told() -> None:
    with pytest.raises(RemoteError, match="cannot collect in this cache: 405") as caught:
        plan_gc(NoList(), WEEK)  # type: ignore[arg-type]
    assert caught.value.code == "KB802"
