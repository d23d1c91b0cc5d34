"""The file operations: what the operating system does by itself, and what we do where it cannot."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from kittybuild.store import disk as disk_module
from kittybuild.store.disk import Disk
from tests.faults import OPERATIONS, Fault, FaultyDisk, Killed


def test_a_new_file_has_its_room_set_aside(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    fd = Disk().create(path, 1 << 20)
    assert os.fstat(fd).st_size == 1 << 20
    Disk().pwrite(fd, memoryview(b"abc"), 7)
    Disk().close(fd)
    assert Path(path).read_bytes()[6:11] == b"\0abc\0"
    with pytest.raises(FileExistsError):
        Disk().create(path, 1)


def test_a_small_file_may_stand_for_a_large_one(tmp_path: Path) -> None:
    path = tmp_path / "header"
    Disk().write_file(str(path), b"abc", size=1 << 30)
    stat = path.stat()
    assert (stat.st_size, stat.st_blocks * 512 < 1 << 20) == (1 << 30, True)
    with open(path, "rb") as file:
        assert file.read(5) == b"abc\0\0"


def test_a_file_without_room_is_not_left_behind(tmp_path: Path) -> None:
    class Full(Disk):
        def _allocate(self, fd: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Full().create(str(tmp_path / "file"), 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_copy_falls_back_where_the_kernel_cannot(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    assert copied(tmp_path) == b"\0\0cdefgh\0\0"


def test_a_copy_may_be_done_in_the_kernel_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(src: int, dst: int, count: int, src_offset: int, dst_offset: int) -> int:
        if src_offset >= 6:  # the kernel may stop anywhere
            return 0
        return os.pwrite(dst, os.pread(src, min(count, 2), src_offset), dst_offset)

    monkeypatch.setattr(os, "copy_file_range", slow, raising=False)
    assert copied(tmp_path) == b"\0\0cdefgh\0\0"


def copied(folder: Path) -> bytes:
    (folder / "source").write_bytes(b"abcdefghij")
    source, target = os.open(folder / "source", os.O_RDONLY), Disk().create(str(folder / "target"), 10)
    Disk().copy_range(source, 2, target, 2, 6)
    with pytest.raises(OSError, match="ends too early"):
        Disk().copy_range(source, 8, target, 8, 3)
    Disk().pwrite(target, bytes(2), 8)
    os.close(source)
    os.close(target)
    return (folder / "target").read_bytes()


def test_copying_inside_the_kernel_gives_the_same(tmp_path: Path) -> None:
    assert copied(tmp_path) == b"\0\0cdefgh\0\0"


def test_two_folders_are_swapped_in_one_step(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    Disk().exchange(str(tmp_path / "old"), str(tmp_path / "new"))
    assert (tmp_path / "old/new").exists()
    assert (tmp_path / "new/old").exists()
    with pytest.raises(OSError, match="No such file"):
        Disk().exchange(str(tmp_path / "old"), str(tmp_path / "absent"))


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"one", b"two", b"two", b""):
        Disk().write_file(str(path), data)
        assert path.read_bytes() == data
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    Disk().write_file(str(path), b"x", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_small_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    Disk().write_file(str(path), b"old")
    for n in range(7):  # write_file, create, pwrite, fsync, close, chmod, rename
        disk = FaultyDisk(n, Fault.SHORT)
        with pytest.raises(OSError, match="Input/output error"):
            disk.write_file(str(path), b"new and longer")
        disk.bury()
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folders_are_made_with_what_is_missing_above_them(tmp_path: Path) -> None:
    for _ in range(2):
        Disk().makedirs(str(tmp_path / "a/b/c"))
    assert (tmp_path / "a/b/c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        Disk().makedirs(str(tmp_path / "file"))
    with pytest.raises(FileExistsError):
        Disk().makedirs(str(tmp_path / "file/below"))


def test_deleting_what_is_absent_is_fine(tmp_path: Path) -> None:
    (tmp_path / "folder/below").mkdir(parents=True)
    for _ in range(2):
        Disk().unlink(str(tmp_path / "file"))
        Disk().rmtree(str(tmp_path / "folder"))
    assert list(tmp_path.iterdir()) == []


def test_appending_goes_to_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    for data in (b"one", b"two"):
        fd = Disk().open_append(path)
        Disk().append(fd, data)
        Disk().start_writing(fd)
        Disk().fsync(fd)
        Disk().close(fd)
    assert Path(path).read_bytes() == b"onetwo"


def test_a_second_name_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    Disk().link(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "a").samefile(tmp_path / "b")
    Disk().rename(str(tmp_path / "a"), str(tmp_path / "c"))
    assert not (tmp_path / "a").exists()


def test_after_a_kill_nothing_is_done_any_more(tmp_path: Path) -> None:
    disk = FaultyDisk(1, Fault.KILL)
    fd = disk.create(str(tmp_path / "file"))
    for _ in range(2):
        with pytest.raises(Killed):
            disk.close(fd)
    with pytest.raises(Killed):
        disk.unlink(str(tmp_path / "file"))
    disk.bury()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_faulty_disk_counts_every_operation() -> None:
    assert all(getattr(FaultyDisk, name).__wrapped__ is getattr(Disk, name) for name in OPERATIONS)
    assert disk_module.__doc__
