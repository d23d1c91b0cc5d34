"""Ranges of tensors and companion files, read from open files that threads share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kittybuild.checkpoint.reading import Files, read_companion
from kittybuild.checkpoint.source import Companion, Entry, FileId
from kittybuild.errors import SourceError
from kittybuild.tensors import DType, TensorSpec


def entry(path: Path, offset: int = 4, size: int = 100) -> Entry:
    return Entry("x", TensorSpec(DType.U8, (size,)), str(path), offset, size)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(b"head" + bytes(range(100)) + b"tail")
    return path


def test_a_range_counts_from_the_tensors_own_start(file: Path) -> None:
    with Files() as files:
        buffer = bytearray(3)
        files.reader(entry(file)).read_into(7, memoryview(buffer))
        assert buffer == bytes([7, 8, 9])
        assert files.bytes_read == 3


def test_threads_share_one_open_file(file: Path) -> None:
    with Files() as files, ThreadPoolExecutor(4) as pool:

        def part(start: int) -> bytes:
            buffer = bytearray(10)
            files.reader(entry(file)).read_into(start, memoryview(buffer))
            return bytes(buffer)

        assert b"".join(pool.map(part, range(0, 100, 10))) == bytes(range(100))
        assert files.bytes_read == 100


def test_a_file_that_ends_early_is_an_error(file: Path) -> None:
    with Files() as files, pytest.raises(SourceError, match="96 bytes too early") as caught:
        files.reader(entry(file, 104)).read_into(0, memoryview(bytearray(100)))
    assert (caught.value.code, caught.value.at) == ("KB202", str(file))


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with Files() as files, pytest.raises(SourceError) as caught:
        files.reader(entry(tmp_path / "none")).read_into(0, memoryview(bytearray(1)))
    assert caught.value.code == "KB201"


def test_closing_twice_is_harmless(file: Path) -> None:
    files = Files()
    files.descriptor(str(file))
    files.close()
    files.close()


def test_companions_are_read_whole(file: Path, tmp_path: Path) -> None:
    assert read_companion(Companion("data", str(file))) == file.read_bytes()
    with pytest.raises(SourceError) as caught:
        read_companion(Companion("none", str(tmp_path / "none")))
    assert caught.value.code == "KB201"


def test_the_identity_of_a_file_changes_with_it(file: Path) -> None:
    before = FileId.of(str(file))
    assert FileId.of(str(file)) == before
    file.write_bytes(file.read_bytes() + b"x")
    assert FileId.of(str(file)).key() != before.key()


def test_a_link_has_the_identity_of_its_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    assert FileId.of(str(tmp_path / "link")) == FileId.of(str(file))
