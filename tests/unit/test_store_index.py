"""The index keeps bytes only: nothing in it is executed, opened or deleted, and damage counts as absence."""

from __future__ import annotations

import os
import pickle
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from kittybuild.digest import Json
from kittybuild.errors import StoreError
from kittybuild.store.disk import Disk
from kittybuild.store.index import BytesDisk, Index


def opened(folder: Path) -> Index:
    def move_aside() -> None:
        os.rename(folder, folder.with_name(f"aside{len(list(folder.parent.iterdir()))}"))

    return Index.open(str(folder), Disk(), move_aside)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def index(folder: Path) -> Iterator[Index]:
    index = opened(folder)
    yield index
    index.close()


def sql(folder: Path, query: str, *values: object) -> None:
    connection = sqlite3.connect(folder / "cache.db")
    connection.execute(query, values)
    connection.commit()
    connection.close()


def test_a_fact_is_what_was_put_last(index: Index) -> None:
    value: Json = {"a": [1, "ü", None, True]}
    index.put_many("kind", {"k": value, "other": 1})
    assert index.get("kind", "k") == value
    assert index.get("another", "k") is None
    index.put_many("kind", {"k": "new"})
    assert index.get("kind", "k") == "new"
    assert index.count("kind") == 2
    index.delete("kind", ["k", "absent"])
    assert index.get("kind", "k") is None
    assert index.count("kind") == 1
    assert index.count("kin") == index.count("kind:") == 0


def test_facts_outlive_the_process(folder: Path) -> None:
    index = opened(folder)
    index.put_many("kind", {"k": 7})
    index.sync()
    index.close()
    index = opened(folder)
    assert index.get("kind", "k") == 7
    index.sync()
    index.close()


def test_many_are_read_at_once_and_in_order(index: Index) -> None:
    facts: dict[str, Json] = {f"{n:04}": n for n in range(1700)}
    index.put_many("kind", facts)
    index.put_many("kine", {"x": 1})
    index.put_many("kinc", {"x": 1})
    assert index.get_many("kind", [*facts, "absent", "0001"]) == facts
    assert list(index.iterate("kind")) == list(facts.items())
    assert [key for key, _ in index.iterate("kind", "001")] == [f"001{n}" for n in range(10)]
    assert index.get_many("kind", []) == {}


def test_adding_keeps_what_is_known_and_tells_what_differs(index: Index) -> None:
    index.put_many("kind", {"same": 1, "other": 2})
    assert index.add_many("kind", {"same": 1, "other": 3, "new": 4}) == {"other": 2}
    assert dict(index.iterate("kind")) == {"same": 1, "other": 2, "new": 4}
    assert index.add_many("kind", {}) == {}


def test_all_or_none_of_many_are_put(index: Index) -> None:
    with pytest.raises(TypeError):
        index.put_many("kind", {"a": 1, "b": object()})  # type: ignore[dict-item]
    assert index.count("kind") == 0


class Planted:
    """Unpickling it leaves a file: proof that something was executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_planted_pickle_is_absent_and_never_loaded(index: Index, folder: Path, tmp_path: Path, in_file: bool) -> None:
    trap, proof = tmp_path / "index/trap.val", tmp_path / "executed"
    index.put_many("kind", {"k": 1, "fine": 2})
    data = pickle.dumps(Planted(proof))
    trap.write_bytes(data)
    sql(
        folder,
        "UPDATE Cache SET mode = 4, value = ?, filename = ? WHERE key = 'kind:k'",
        None if in_file else data,
        "trap.val" if in_file else None,
    )
    sql(folder, "INSERT INTO Cache (key, raw, store_time, mode, value) VALUES (?, 0, 0, 4, ?)", data, data)
    index.close()
    index = opened(folder)
    assert index.get("kind", "k") is None
    assert index.get_many("kind", ["k", "fine"]) == {"fine": 2}
    assert list(index.iterate("kind")) == [("fine", 2)]
    assert sorted(index._cache) == ["", "kind:fine", "kind:k"]
    index.put_many("kind", {"k": 3})
    assert index.get("kind", "k") == 3
    assert trap.exists(), "no row can have a file deleted"
    assert not proof.exists()
    pickle.loads(data)
    assert proof.exists(), "the trap itself works"


@pytest.mark.parametrize(("mode", "value"), [(2, None), (3, None), (1, "text"), (1, 7), (9, b"bytes")])
def test_a_row_of_another_kind_is_absent(index: Index, folder: Path, mode: int, value: object) -> None:
    index.put_many("kind", {"k": 1})
    secret = folder / "secret"
    secret.write_text("not to be read")
    sql(folder, "UPDATE Cache SET mode = ?, value = ?, filename = 'secret' WHERE key = 'kind:k'", mode, value)
    assert index.get("kind", "k") is None
    assert index.get_many("kind", ["k"]) == {}


def test_a_row_that_was_damaged_or_moved_is_absent(index: Index, folder: Path) -> None:
    index.put_many("kind", {"damaged": "value", "moved": "value", "fine": "value"})
    sql(folder, "UPDATE Cache SET value = replace(value, 'alu', 'ulu') WHERE key = 'kind:damaged'")
    sql(folder, "UPDATE Cache SET key = 'kind:elsewhere' WHERE key = 'kind:moved'")
    assert dict(index.iterate("kind")) == {"fine": "value"}
    assert index.get("kind", "damaged") is None
    assert index.get("kind", "elsewhere") is None


def test_only_bytes_and_text_keys_go_in(tmp_path: Path) -> None:
    disk = BytesDisk(str(tmp_path), unknown_setting=1)
    with pytest.raises(TypeError):
        disk.put(b"bytes")
    with pytest.raises(TypeError):
        disk.put(("a", "tuple"))
    for value in ("text", 1, None, object()):
        with pytest.raises(TypeError):
            disk.store(value, False)


def test_planted_settings_neither_hurt_nor_unpickle(index: Index, folder: Path) -> None:
    index.put_many("kind", {"k": 1})
    sql(folder, "INSERT INTO Settings VALUES ('disk_unknown', 'x')")
    sql(folder, "UPDATE Settings SET value = 1 WHERE key IN ('cull_limit', 'size_limit', 'disk_min_file_size')")
    index.close()
    index = opened(folder)
    index.put_many("kind", {f"n{n}": "x" * 100 for n in range(50)})
    assert index.count("kind") == 51
    index.close()


@pytest.mark.parametrize("garbage", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 5000, b""])
def test_a_corrupt_index_is_moved_aside_and_made_anew(folder: Path, tmp_path: Path, garbage: bytes) -> None:
    index = opened(folder)
    index.put_many("kind", {"k": 1})
    index.close()
    (folder / "cache.db").write_bytes(garbage)
    index = opened(folder)
    assert index.get("kind", "k") is None
    index.put_many("kind", {"k": 2})
    assert index.get("kind", "k") == 2
    index.close()
    aside = [path for path in tmp_path.iterdir() if path.name.startswith("aside")]
    assert [(path / "cache.db").read_bytes() for path in aside] == [garbage] * (1 if garbage else 0)


@pytest.mark.parametrize("statement", ["DROP TABLE Cache", "ALTER TABLE Cache RENAME COLUMN value TO other"])
def test_an_index_without_its_tables_is_moved_aside(folder: Path, statement: str) -> None:
    index = opened(folder)
    sql(folder, statement)
    with pytest.raises(StoreError, match="KB708: the index is damaged and was moved aside") as caught:
        index.get("kind", "k")
    assert caught.value.at == str(folder)
    assert caught.value.hint == "run again: it is made anew from packs and manifests"
    assert not folder.exists()
    index = opened(folder)
    index.put_many("kind", {"k": 2})
    assert index.get("kind", "k") == 2


def test_a_full_disk_is_told_from_a_damaged_index(index: Index) -> None:
    index.put_many("kind", {"k": 1})
    index._cache._sql("PRAGMA max_page_count = 1")
    with pytest.raises(StoreError, match="KB704: the disk is full"):
        index.put_many("kind", {f"n{n}": "x" * 1000 for n in range(200)})
    assert index.get("kind", "k") == 1


def test_a_path_that_would_be_expanded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITTYBUILD_TEST", "elsewhere")
    with pytest.raises(StoreError, match="KB701: the path of the store contains the name of an environment variable"):
        opened(tmp_path / "$KITTYBUILD_TEST")
    (tmp_path / "$nothing").mkdir()
    opened(tmp_path / "$nothing" / "index").close()


def test_reading_needs_no_query_for_each_key(index: Index) -> None:
    """The two private words of diskcache that we use still mean what they meant."""
    index.put_many("kind", {f"{n}": n for n in range(10)})
    assert index._cache._sql("SELECT COUNT(*) FROM Cache WHERE raw = 1 AND mode = 1").fetchone() == (10,)
    assert (index._cache.eviction_policy, index._cache.cull_limit) == ("none", 0)
    assert index._cache._sql("PRAGMA journal_mode").fetchone() == ("wal",)
