"""What every bucket must do, on every server that we can start here, and behind every wrapper."""

from __future__ import annotations

from pathlib import Path

import pytest

from kittybuild.store.remote.bucket import Bucket, Piece, Unreachable
from kittybuild.store.remote.objects import Objects, connect
from kittybuild.testing.contracts import BUCKET, BrokenContract, check_bucket
from tests.contract.conftest import Flaky


@pytest.mark.parametrize("check", BUCKET)
def test_a_bucket(bucket: Bucket, check: str) -> None:
    BUCKET[check](bucket)


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


class Greedy(Flaky):
    """Gives the whole object, whatever was asked for."""

    def _perhaps(self) -> None: ...

    def read(self, name: str, start: int = 0, length: int = 1 << 20) -> Piece | None:
        return self.inner.read(name)


def test_a_broken_contract_is_named() -> None:
    from obstore.store import MemoryStore

    bucket = Objects(MemoryStore(), "memory")
    check_bucket(bucket)
    check_bucket(bucket)
    with pytest.raises(BrokenContract, match="2 bytes from 0"):
        check_bucket(Greedy(bucket))
