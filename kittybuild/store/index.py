"""The index: facts by kind and key, in one SQLite database. Losing it costs time, never correctness.

It is a `diskcache.Cache` that keeps bytes only: nothing stored is ever unpickled, and no row can name a file. Each
value carries a checksum over its key and itself, so that a row that was damaged or moved counts as absent.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

import diskcache
from xxhash import xxh3_64_hexdigest

from kittybuild.digest import Json, canonical
from kittybuild.errors import StoreError
from kittybuild.store.disk import Disk
from kittybuild.store.problems import NO_ROOM, full, guarded, index_failed, locked

_PATIENCE = 300.0
_MOST_VARIABLES = 500
_NEVER = 1 << 40
_ROWS = "SELECT key, mode, value FROM Cache WHERE raw = 1 AND "
_SQLITE_FULL = 13
# What SQLite maps as memory that processes share, set aside by pages of 4096 bytes.
_SHARED, _PAGE = 1 << 15, 4096


class BytesDisk(diskcache.Disk):  # type: ignore[misc]
    """Keys are text, values are bytes inside the database; every other kind of row is absent."""

    def __init__(self, directory: str, **_settings: object) -> None:
        # The settings come from the database, so those that are not ours are not an error but not heeded either.
        super().__init__(directory, min_file_size=_NEVER)

    def put(self, key: object) -> tuple[str, bool]:
        """The key as it is."""
        if not isinstance(key, str):
            raise TypeError(f"not a key: {key!r}")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """The key as it is; never unpickled."""
        return key if raw and isinstance(key, str) else ""

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, memoryview]:
        """The value as it is; never pickled, never a file."""
        if not isinstance(value, bytes) or read:
            raise TypeError("the index keeps bytes only")
        return 0, diskcache.core.MODE_RAW, None, memoryview(value)

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> bytes | None:
        """The value if it is one of ours; never unpickled, never read from a file."""
        return value if mode == diskcache.core.MODE_RAW and isinstance(value, bytes) else None

    def remove(self, file_path: str) -> None:
        """Nothing: no row of ours has a file."""


class Index:
    """Facts by kind and key. Thread-safe, and safe between processes."""

    def __init__(self, folder: str, disk: Disk, cache: Any, move_aside: Callable[[], None]) -> None:
        self._folder = folder
        self._disk = disk
        self._cache = cache
        self._move_aside = move_aside

    @classmethod
    def open(cls, folder: str, disk: Disk, move_aside: Callable[[], None]) -> Index:
        """Open or make the index. A corrupt one is moved aside, by `move_aside`, and a new one is made.

        The caller holds a lock, so that no other process opens or moves it at the same time.
        """
        disk.makedirs(folder)
        _see_that_there_is_room(folder)
        try:
            return cls(folder, disk, _open_cache(folder), move_aside)
        except (sqlite3.DatabaseError, diskcache.Timeout) as error:
            if not _is_corrupt(error):
                raise _problem(folder, error, disk) from error
        move_aside()
        disk.makedirs(folder)
        try:
            return cls(folder, disk, _open_cache(folder), move_aside)
        except (sqlite3.DatabaseError, diskcache.Timeout) as error:
            raise _problem(folder, error, disk) from error

    def close(self) -> None:
        """Close the database in this thread."""
        with self._guard():
            self._cache.close()

    def sync(self) -> None:
        """Return when all facts so far are on the disk: they are in SQLite's log, which it syncs only now and then."""
        log = os.path.join(self._folder, f"{diskcache.core.DBNAME}-wal")
        if not os.path.exists(log):  # then all facts are in the database itself, and synced
            return
        with guarded("sync", log):
            fd = self._disk.open_append(log)
            try:
                self._disk.fsync(fd)
            finally:
                self._disk.close(fd)
            self._disk.sync_dir(self._folder)

    def get(self, kind: str, key: str) -> Json:
        """The fact, or None."""
        with self._guard():
            return _decoded(_row_key(kind, key), self._cache.get(_row_key(kind, key)))

    def get_many(self, kind: str, keys: Iterable[str]) -> dict[str, Json]:
        """Those of the facts that are known."""
        wanted = sorted({_row_key(kind, key) for key in keys})
        found: dict[str, Json] = {}
        for start in range(0, len(wanted), _MOST_VARIABLES):
            some = wanted[start : start + _MOST_VARIABLES]
            found.update(self._rows(f"{_ROWS} key IN ({','.join('?' * len(some))})", some))
        return {row.partition(":")[2]: value for row, value in found.items()}

    def put_many(self, kind: str, facts: Mapping[str, Json]) -> None:
        """Store all of the facts, or none; a known key gets the new value."""
        if facts:
            with self._guard(), self._cache.transact():
                self._set(kind, facts)

    def add_many(self, kind: str, facts: Mapping[str, Json]) -> dict[str, Json]:
        """Store the facts whose keys are new; the answer is what was known of the others and differs."""
        if not facts:
            return {}
        with self._guard(), self._cache.transact():
            known = self.get_many(kind, facts)
            self._set(kind, {key: value for key, value in facts.items() if key not in known})
        return {key: value for key, value in known.items() if value != facts[key]}

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is stored in this block, or nothing."""
        with self._guard(), self._cache.transact():
            yield

    def delete(self, kind: str, keys: Collection[str]) -> None:
        """Forget the facts; absent is fine."""
        if keys:
            with self._guard(), self._cache.transact():
                for key in keys:
                    self._cache.delete(_row_key(kind, key))

    def iterate(self, kind: str, prefix: str = "") -> Iterator[tuple[str, Json]]:
        """All facts of a kind whose keys begin with `prefix`, by key."""
        start = _row_key(kind, prefix)
        for row, value in self._rows(f"{_ROWS} key >= ? AND key < ? ORDER BY key", [start, _after(start)]):
            yield row.partition(":")[2], value

    def count(self, kind: str) -> int:
        """How many facts there are of a kind."""
        start = _row_key(kind, "")
        with self._guard():
            query = "SELECT COUNT(*) FROM Cache WHERE raw = 1 AND key >= ? AND key < ?"
            return int(self._cache._sql(query, (start, _after(start))).fetchone()[0])

    def damage(self) -> str | None:
        """What is wrong with the database itself."""
        try:
            found = [row[0] for row in self._cache._sql("PRAGMA quick_check(1)").fetchall()]
        except (sqlite3.DatabaseError, diskcache.Timeout) as error:
            return f"the database cannot be read: {error}"
        return None if found == ["ok"] else f"the database is damaged: {found[0] if found else 'no answer'}"

    def damaged_rows(self) -> int:
        """How many rows are not as we wrote them. They count as absent anyway."""
        return len(self._damaged())

    def drop_damaged(self) -> None:
        """Delete these rows."""
        with self._guard(), self._cache.transact():
            for row in self._damaged():
                self._cache._sql("DELETE FROM Cache WHERE rowid = ?", (row,))

    def _damaged(self) -> list[int]:
        with self._guard():
            rows = self._cache._sql("SELECT rowid, key, mode, value FROM Cache").fetchall()
        return [row for row, key, mode, value in rows if not _is_ours(key, mode, value)]

    def _set(self, kind: str, facts: Mapping[str, Json]) -> None:
        for key, value in facts.items():
            row = _row_key(kind, key)
            self._cache.set(row, _encoded(row, value))

    def _rows(self, query: str, values: list[str]) -> list[tuple[str, Json]]:
        # diskcache has no reading of many rows at once; one query is 20 times faster than its `get` for each.
        with self._guard():
            rows = self._cache._sql(query, values).fetchall()
        ours = ((key, _decoded(key, value)) for key, mode, value in rows if mode == diskcache.core.MODE_RAW)
        return [(key, value) for key, value in ours if value is not None]

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, diskcache.Timeout) as error:
            if _is_corrupt(error):
                self._move_aside()
                raise index_failed(self._folder, error, moved=True) from error
            raise _problem(self._folder, error, self._disk) from error


def _open_cache(folder: str) -> Any:
    # diskcache expands variables in the path; ours is meant as it is written.
    if os.path.expandvars(folder) != folder:
        raise StoreError(
            "KB701",
            "the path of the store contains the name of an environment variable",
            at=folder,
            hint="name a folder without `$` in its path, with --store or KITTYBUILD_STORE",
        )
    path = os.path.join(folder, diskcache.core.DBNAME)
    existing = sqlite3.connect(path, timeout=_PATIENCE) if os.path.exists(path) else None
    if existing is None:
        return _cache(folder)
    with closing(existing):
        # While this connection is open, the one that diskcache opens and closes first does not write the whole log
        # back: that costs 30 ms on every start.
        with suppress(sqlite3.OperationalError):
            existing.execute("SELECT COUNT(*) FROM Settings").fetchall()
        return _cache(folder)


def _cache(folder: str) -> Any:
    return diskcache.Cache(
        folder,
        timeout=_PATIENCE,
        disk=BytesDisk,
        eviction_policy="none",
        cull_limit=0,
        size_limit=1 << 60,
        disk_min_file_size=_NEVER,
        statistics=0,
    )


def _problem(folder: str, error: Exception, disk: Disk) -> StoreError:
    if isinstance(error, diskcache.Timeout):
        return locked(folder, _PATIENCE)
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == _SQLITE_FULL or "is full" in str(error):
        return full(folder)
    if _is_full(folder, disk):
        return full(folder, _SHARED)
    return index_failed(folder, error)


def _is_full(folder: str, disk: Disk) -> bool:
    """Whether there is no room, which SQLite tells of its tables and not of its shared memory."""
    path = os.path.join(folder, f".{os.urandom(16).hex()}.tmp")
    try:
        disk.close(disk.create(path, _SHARED))
        disk.unlink(path)
    except OSError as error:
        return error.errno in NO_ROOM
    return False


def _see_that_there_is_room(folder: str) -> None:
    """Where blocks are smaller than pages, the shared memory has holes, and to fill one on a full disk is SIGBUS."""
    disk = os.statvfs(folder)
    if disk.f_frsize < _PAGE and disk.f_bavail * disk.f_frsize < 2 * _SHARED:
        raise full(folder, 2 * _SHARED)


def _is_corrupt(error: Exception) -> bool:
    """Whether the database is no index of ours, rather than one that cannot be reached just now."""
    if isinstance(error, sqlite3.OperationalError):
        return "no such" in str(error)  # a table or column of the cache is missing
    return type(error) is sqlite3.DatabaseError


def _row_key(kind: str, key: str) -> str:
    return f"{kind}:{key}"


def _after(prefix: str) -> str:
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _encoded(row: str, value: Json) -> bytes:
    text = canonical(value)
    return _checksum(row, text) + b" " + text


def _decoded(row: str, data: bytes | None) -> Json:
    checksum, _, text = (data if isinstance(data, bytes) else b"").partition(b" ")
    if checksum != _checksum(row, text):
        return None
    try:
        value: Json = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def _is_ours(key: object, mode: object, value: object) -> bool:
    """Whether a row of the database is one that we wrote, as we wrote it."""
    if mode != diskcache.core.MODE_RAW or not isinstance(key, str) or not isinstance(value, bytes):
        return False
    return _decoded(key, value) is not None


def _checksum(row: str, text: bytes) -> bytes:
    return xxh3_64_hexdigest(row.encode() + b"\0" + text).encode()
