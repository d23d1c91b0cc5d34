"""Real file systems for tests that may mount some: in memory, or in a file."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A real file system on `folder`; the test is skipped where we may not mount."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path, kind: str, size: int) -> Iterator[Path]:
    """A file system of `size` bytes: `tmpfs`, or in a file that is mounted as a disk `ext4-BLOCK`, with such blocks."""
    if kind == "tmpfs":
        with mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs") as disk:
            yield disk
        return
    program = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if program is None:
        pytest.skip("there is no mkfs.ext4 here")
    image = folder.with_suffix(".image")
    image.touch()
    os.truncate(image, size)
    block = kind.removeprefix("ext4-")
    subprocess.run([program, "-q", "-F", "-m", "0", "-b", block, str(image)], check=True, capture_output=True)
    with mounted(folder, "-o", "loop", str(image)) as disk:
        yield disk


def fill(disk: Path, room: int = 0) -> None:
    """Fill a disk to the brim, but for so many bytes (to the block)."""
    with open(disk / "ballast", "ab", buffering=0) as file:
        before = -1
        while file.tell() > before:  # what was deleted lately may be free only after the next commit
            before = file.tell()
            for size in (1 << 20, 1 << 12, 1):
                while _fits(file, bytes(size)):
                    pass
            os.fsync(file.fileno())
        os.truncate(file.fileno(), file.tell() - room)
        os.fsync(file.fileno())


def _fits(file: IO[bytes], data: bytes) -> bool:
    try:
        file.write(data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True
