"""Every operation by which the store and the publisher change files, so that a test can fail, cut or kill at each.

Methods raise plain OSError. To delete what is absent is fine; a folder is durable when `makedirs` returns.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from contextlib import suppress

Buffer = bytes | bytearray | memoryview

_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_BLOCK = 4 << 20
_AT_FDCWD = -100
_WRITE_OUT = 2  # SYNC_FILE_RANGE_WRITE of Linux
_RENAME_EXCHANGE = 2  # Linux; RENAME_SWAP of macOS has the same value
_READ_ONLY = 0o444


class Disk:
    """The real operations. A test wraps or subclasses it."""

    def makedirs(self, path: str) -> None:
        """Make the folder and what is missing above it; a name is durable only after a sync of the folder it is in."""
        if os.path.isdir(path):
            return
        parent = os.path.dirname(os.path.abspath(path))
        self.makedirs(parent)
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
        self.sync_dir(parent)

    def create(self, path: str, size: int = 0) -> int:
        """Make a new file with `size` bytes set aside, so that a full disk shows before any work is done."""
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            if size > 0:
                self._allocate(fd, size)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                os.unlink(path)
            raise
        return fd

    def open_append(self, path: str) -> int:
        """Open a file, new or not, to write at its end."""
        return os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o666)

    def open_update(self, path: str) -> int:
        """Open a file that exists, to read it and, if its permissions allow, to write it."""
        try:
            return os.open(path, os.O_RDWR)
        except PermissionError:
            return os.open(path, os.O_RDONLY)

    def open_lock(self, path: str) -> int:
        """Open a file, new or not, that is only ever locked."""
        return os.open(path, os.O_CREAT | os.O_RDWR, 0o666)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`."""
        rest = memoryview(data).cast("B")
        while rest:
            written = os.pwrite(fd, rest, offset)
            offset += written
            rest = rest[written:]

    def append(self, fd: int, data: Buffer) -> None:
        """Write all of `data` at the end of a file from `open_append`."""
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(fd, rest) :]

    def copy_range(self, src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, nbytes: int) -> None:
        """Copy between files; inside the kernel, and without new blocks where the file system can share them."""
        done = _copy_in_kernel(src_fd, src_offset, dst_fd, dst_offset, nbytes)
        while done < nbytes:
            data = os.pread(src_fd, min(_BLOCK, nbytes - done), src_offset + done)
            if not data:
                raise OSError(errno.EIO, "the file to copy from ends too early")
            self.pwrite(dst_fd, data, dst_offset + done)
            done += len(data)

    def extend(self, fd: int, size: int) -> None:
        """Make a file longer, by zeros that take no room."""
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        """Return when data and metadata are on the disk."""
        os.fsync(fd)

    def start_writing(self, fd: int) -> None:
        """Have the system begin to write the data out, and do not wait; no more than a hint, so it never fails."""
        libc = ctypes.CDLL(None)
        if hasattr(libc, "sync_file_range"):
            libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE_OUT)

    def close(self, fd: int) -> None:
        """Close a file."""
        os.close(fd)

    def chmod(self, path: str, mode: int) -> None:
        """Set the permissions."""
        os.chmod(path, mode)

    def set_time(self, fd: int, mtime_ns: int) -> None:
        """Say when a file was last changed."""
        os.utime(fd, ns=(mtime_ns, mtime_ns))

    def rename(self, src: str, dst: str) -> None:
        """Give `src` the name `dst`, in place of what had it."""
        os.replace(src, dst)

    def exchange(self, a: str, b: str) -> None:
        """Swap two files or folders in one step; raises OSError where that cannot be done."""
        libc = ctypes.CDLL(None, use_errno=True)
        first, second = os.fsencode(a), os.fsencode(b)
        if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
            status = libc.renamex_np(first, second, _RENAME_EXCHANGE)
        elif hasattr(libc, "renameat2"):
            status = libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
        else:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), a)
        if status != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), a, None, b)

    def link(self, src: str, dst: str) -> None:
        """Give the file `src` (of a symbolic link: the link itself) a second name."""
        os.link(src, dst, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        """Delete a file."""
        with suppress(FileNotFoundError):
            os.unlink(path)

    def rmtree(self, path: str) -> None:
        """Delete a folder with all that is in it."""
        with suppress(FileNotFoundError):
            shutil.rmtree(path)

    def sync_dir(self, path: str) -> None:
        """Return when the names in a folder are on the disk."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:  # some network file systems cannot, and need not
                raise
        finally:
            os.close(fd)

    def write_file(self, path: str, data: Buffer, mode: int = _READ_ONLY, size: int = 0) -> None:
        """Write a small file whole or not at all, durably; in place of what had the name.

        `size`: as many bytes as the file has at least, zeros behind the data.
        """
        folder = os.path.dirname(os.path.abspath(path))
        temporary = os.path.join(folder, f".{os.urandom(16).hex()}.tmp")
        fd = self.create(temporary)
        try:
            try:
                self.pwrite(fd, data, 0)
                if size > memoryview(data).nbytes:
                    self.extend(fd, size)
                self.fsync(fd)
            finally:
                self.close(fd)
            self.chmod(temporary, mode)
            self.rename(temporary, path)
        except OSError:
            with suppress(OSError):
                self.unlink(temporary)
            raise
        self.sync_dir(folder)

    def _allocate(self, fd: int, size: int) -> None:
        allocate = getattr(os, "posix_fallocate", None)
        try:
            if allocate is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            allocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            os.ftruncate(fd, size)


def _copy_in_kernel(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, nbytes: int) -> int:
    """How many bytes the kernel copied by itself; the caller copies the rest."""
    copy = getattr(os, "copy_file_range", None)
    done = 0
    while copy is not None and done < nbytes:
        try:
            step = copy(src_fd, dst_fd, nbytes - done, src_offset + done, dst_offset + done)
        except OSError as error:
            if error.errno not in (*_NOT_SUPPORTED, errno.EXDEV, errno.EBADF):
                raise
            break
        if step == 0:
            break
        done += int(step)
    return done
