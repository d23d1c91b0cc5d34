"""A bucket on every server that we can start here, and behind every wrapper."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kittybuild.store.remote.bucket import Bucket, Listed, Piece, Retried, Unreachable
from kittybuild.store.remote.objects import Objects, connect
from tests.servers import azurite, gcs, moto, nginx, rclone

KINDS = ("memory", "folder", "retried", "moto", "gcs", "azurite", "nginx", "rclone")


@pytest.fixture(scope="package", params=KINDS)
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """One server for all cases: each takes names of its own."""
    folder = tmp_path_factory.mktemp("bucket")
    with ExitStack() as running:
        yield _bucket(request.param, folder, running)


def _bucket(kind: str, folder: Path, running: ExitStack) -> Bucket:
    match kind:
        case "memory":
            from obstore.store import MemoryStore

            return Objects(MemoryStore(), "memory")
        case "folder":
            return connect(str(folder))
        case "retried":
            return Retried(Flaky(connect(folder.as_uri())), pause=0.001)
        case "nginx" | "rclone":
            return connect(running.enter_context({"nginx": nginx, "rclone": rclone}[kind](folder)))
    return connect(running.enter_context({"moto": moto, "gcs": gcs, "azurite": azurite}[kind]()))


class Flaky:
    """Fails every second request of a thread."""

    def __init__(self, inner: Bucket) -> None:
        self.inner, self.where, self._last = inner, "flaky", threading.local()

    def _perhaps(self) -> None:
        self._last.failed = not getattr(self._last, "failed", False)
        if self._last.failed:
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
