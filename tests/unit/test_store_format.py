"""FORMAT: who may use a store, who may delete in it, and how an older one is brought to our version."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from kittybuild.errors import StoreError
from kittybuild.store.format import Format
from kittybuild.store.gc import Policy
from kittybuild.store.store import Store
from tests.faults import THREE, UnsyncedDisk, assert_sound, build


def old_store(root: Path) -> None:
    """A store of version 1: without a reserve."""
    build(str(root), UnsyncedDisk())
    (root / "FORMAT").write_bytes(b"kittybuild-store 1\n")
    os.unlink(root / "reserve")


def test_a_format_is_what_it_is_written_as() -> None:
    for form in (Format(), Format(1), Format(12, frozenset({("use", "blocks"), ("delete", "leases-2")}))):
        assert Format.parse(form.to_bytes()) == form
    for text in (b"", b"kittybuild-store 2", b"kittybuild-store 02\n", b"kittybuild-store 2\nread it\n", b"\xff"):
        assert Format.parse(text) is None


def test_an_older_store_is_migrated(tmp_path: Path) -> None:
    old_store(tmp_path)
    with Store.open(str(tmp_path)) as store:
        assert store.realisations(s.key for s in THREE) == {s.key: s.ref for s in THREE}
    assert (tmp_path / "FORMAT").read_bytes() == b"kittybuild-store 2\n"
    assert (tmp_path / "reserve").exists()
    assert_sound(str(tmp_path), [s.ref.digest for s in THREE])


def test_migration_waits_for_those_who_have_the_older_store_open(tmp_path: Path) -> None:
    with Store.open(str(tmp_path)) as other:
        (tmp_path / "FORMAT").write_bytes(b"kittybuild-store 1\n")
        thread = threading.Thread(target=lambda: Store.open(str(tmp_path)).close())
        thread.start()
        thread.join(0.1)
        assert (tmp_path / "FORMAT").read_bytes() == b"kittybuild-store 1\n"
        other.close()
        thread.join(10)
    assert (tmp_path / "FORMAT").read_bytes() == b"kittybuild-store 2\n"


def test_a_feature_that_we_do_not_know_is_refused_where_it_matters(tmp_path: Path) -> None:
    build(str(tmp_path), UnsyncedDisk())
    (tmp_path / "FORMAT").write_bytes(b"kittybuild-store 2\ndelete leases\n")
    with Store.open(str(tmp_path)) as store:
        assert store.realisations(s.key for s in THREE)
        with pytest.raises(StoreError, match="KB702"):
            store.collect(Policy())
    with pytest.raises(StoreError, match="KB702: this store is of format 'kittybuild-store 2, delete leases'"):
        Store.open(str(tmp_path), to_clean=True)
    (tmp_path / "FORMAT").write_bytes(b"kittybuild-store 2\nuse blocks\n")
    with pytest.raises(StoreError, match="KB702"):
        Store.open(str(tmp_path))


def test_a_damaged_format_is_mended_and_one_of_another_version_is_not(tmp_path: Path) -> None:
    build(str(tmp_path), UnsyncedDisk())
    assert not Store.mend_format(str(tmp_path))
    for data in (b"", b"kittybuild-stor", b"kittybuild-store 2", b"kitty\xffuild-store 2\n"):
        (tmp_path / "FORMAT").write_bytes(data)
        assert Store.mend_format(str(tmp_path))
        Store.open(str(tmp_path)).close()
    (tmp_path / "FORMAT").write_bytes(b"kittybuild-store 3\n")
    assert not Store.mend_format(str(tmp_path))
    assert not Store.mend_format(str(tmp_path / "packs"))
    assert not Store.mend_format(str(tmp_path / "nowhere"))
