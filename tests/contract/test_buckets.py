"""What every bucket must do, on every server that we can start here, and behind every wrapper."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kittybuild.store.remote.bucket import Bucket, Listed, Piece, Retried, Unreachable, stream, whole
from kittybuild.store.remote.objects import Objects, connect
from tests.servers import azurite, gcs, moto, nginx, rclone

KINDS = ("memory", "folder", "retried", "moto", "gcs", "azurite", "nginx", "rclone")
NAMES = (f"cas/ab/{n}" for n in itertools.count())


@pytest.fixture(scope="module", params=KINDS)
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """One server for all cases: each takes names of its own."""
    folder = tmp_path_factory.mktemp("bucket")
    match request.param:
        case "memory":
            from obstore.store import MemoryStore

            yield Objects(MemoryStore(), "memory")
        case "folder":
            yield connect(str(folder))
        case "retried":
            yield Retried(Flaky(connect(folder.as_uri())), pause=0.001)
        case "moto":
            with moto() as url:
                yield connect(url)
        case "gcs":
            with gcs() as url:
                yield connect(url)
        case "azurite":
            with azurite() as url:
                yield connect(url)
        case "nginx":
            with nginx(folder) as url:
                yield connect(url)
        case "rclone":
            with rclone(folder) as url:
                yield connect(url)


class Flaky:
    """Fails every second request."""

    def __init__(self, inner: Bucket) -> None:
        self.inner, self.numbers, self.where = inner, itertools.count(), "flaky"

    def _perhaps(self) -> None:
        if next(self.numbers) % 2 == 0:
            raise Unreachable("not now")

    def read(self, name: str, start: int = 0, length: int = 1 << 20) -> Piece | None:
        self._perhaps()
        return self.inner.read(name, start, length)

    def put(self, name: str, data: memoryview) -> None:
        self._perhaps()
        self.inner.put(name, data)

    def head(self, name: str) -> Listed | None:
        self._perhaps()
        return self.inner.head(name)

    def list(self, folder: str) -> Iterator[Listed]:
        self._perhaps()
        return self.inner.list(folder)

    def delete(self, name: str) -> None:
        self._perhaps()
        self.inner.delete(name)


@pytest.fixture
def name() -> str:
    return next(NAMES)


def put(bucket: Bucket, name: str, data: bytes) -> None:
    bucket.put(name, memoryview(data))


class TestBuckets:
    def test_absent_is_none(self, bucket: Bucket, name: str) -> None:
        assert bucket.read(name) is None
        assert bucket.head(name) is None
        assert whole(bucket, name, 10) is None

    def test_what_was_put_is_read(self, bucket: Bucket, name: str) -> None:
        put(bucket, name, b"weights")
        piece = bucket.read(name)
        assert piece is not None
        assert (bytes(piece.data), piece.total) == (b"weights", 7)
        told = bucket.head(name)
        assert told is not None
        assert (told.name, told.size) == (name, 7)
        assert abs(told.put - time.time()) < 100
        assert whole(bucket, name, 7) == b"weights"

    @pytest.mark.parametrize(("start", "length", "found"), [(0, 2, b"we"), (3, 2, b"gh"), (5, 100, b"ts")])
    def test_a_range_is_read_alone(self, bucket: Bucket, name: str, start: int, length: int, found: bytes) -> None:
        put(bucket, name, b"weights")
        piece = bucket.read(name, start, length)
        assert piece is not None
        assert (bytes(piece.data), piece.total) == (found, 7)

    def test_putting_twice_is_harmless_and_the_last_counts(self, bucket: Bucket, name: str) -> None:
        for data in (b"first", b"first", b"second!"):
            put(bucket, name, data)
        assert whole(bucket, name, 7) == b"second!"

    def test_an_empty_object_is_read(self, bucket: Bucket, name: str) -> None:
        put(bucket, name, b"")
        assert bucket.read(name) == Piece(memoryview(b""), 0)
        assert whole(bucket, name, 10) == b""

    def test_large_objects_come_in_windows(self, bucket: Bucket, name: str) -> None:
        data = bytes(range(256)) * 70_000  # 18 MB: two windows and a bit
        put(bucket, name, data)
        parts = stream(bucket, name, len(data))
        assert parts is not None
        pieces = [bytes(part) for part in parts]
        assert len(pieces) == 3
        assert b"".join(pieces) == data

    def test_more_than_asked_for_is_refused_before_it_comes(self, bucket: Bucket, name: str) -> None:
        put(bucket, name, b"x" * 10_000)
        with pytest.raises(Unreachable, match="10000 bytes, more than the 100"):
            whole(bucket, name, 100)

    def test_all_are_listed_under_their_folder_only(self, bucket: Bucket, name: str) -> None:
        folder = f"traces/{name.rpartition('/')[2]}"
        put(bucket, f"{folder}/team-1.json", b"one")
        put(bucket, f"{folder}/other-1.json", b"three")
        put(bucket, f"{folder}0/team-1.json", b"elsewhere")
        told = sorted(bucket.list(folder), key=lambda one: one.name)
        assert [(one.name, one.size) for one in told] == [(f"{folder}/other-1.json", 5), (f"{folder}/team-1.json", 3)]
        assert all(abs(one.put - time.time()) < 100 for one in told)
        assert list(bucket.list(f"{folder}-none")) == []

    def test_deleting_is_harmless_twice(self, bucket: Bucket, name: str) -> None:
        put(bucket, name, b"x")
        bucket.delete(name)
        bucket.delete(name)
        assert bucket.head(name) is None


def test_nobody_there_is_unreachable() -> None:
    bucket = connect("http://127.0.0.1:9/cache")
    with pytest.raises(Unreachable):
        bucket.head("cas/ab/x")


def test_no_name_leads_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    bucket = connect(str(tmp_path / "cache"))
    for name in ("../secret", "cas/../../secret"):
        with pytest.raises(Unreachable):
            bucket.read(name)
