"""Reading ranges of tensors. A reader fills buffers with the tensor's own bytes, whatever lies in the file.

Files are opened once and read with positioned reads, so that any number of threads may share a Files.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol

from kittybuild.checkpoint.source import RAW, Companion, Entry
from kittybuild.errors import SourceError
from kittybuild.tensors import TensorSpec


class Reader(Protocol):
    """The bytes of one tensor."""

    @property
    def spec(self) -> TensorSpec:
        """What the bytes mean."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from byte `start` of the tensor on; raises SourceError KB202 where they end."""


class Files:
    """Open files by path, and the bytes read from them so far."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0

    def descriptor(self, path: str) -> int:
        """The open file at `path`; raises SourceError KB201."""
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                except OSError as error:
                    raise SourceError("KB201", f"cannot read: {error.strerror}", at=path) from error
            return self._descriptors[path]

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        descriptor, done = self.descriptor(path), 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise SourceError("KB202", f"reading failed: {error.strerror}", at=path) from error
            if count == 0:
                hint = "it changed during the build; download or copy it again"
                raise SourceError("KB202", f"the file ends {len(buffer) - done} bytes too early", at=path, hint=hint)
            done += count
        with self._lock:
            self.bytes_read += done

    def reader(self, entry: Entry) -> Reader:
        """A reader of one tensor of a source."""
        return (
            RawReader(self, entry.file, entry.offset, entry.spec) if entry.encoding == RAW else GgufReader(self, entry)
        )

    def close(self) -> None:
        """Close all files; doing it twice is harmless."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RawReader:
    """A tensor whose stored bytes are its own."""

    def __init__(self, files: Files, path: str, offset: int, spec: TensorSpec) -> None:
        self.files, self.path, self.offset, self.spec = files, path, offset, spec

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See Reader."""
        self.files.read_into(self.path, self.offset + start, buffer)


class GgufReader:
    """A tensor that is decoded on the way, row by row."""

    def __init__(self, files: Files, entry: Entry) -> None:
        self.files, self.entry, self.spec = files, entry, entry.spec

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See Reader. Whole rows are decoded and the wanted bytes taken from them."""
        from kittybuild.checkpoint.gguf import decode_rows

        row = (self.spec.shape[-1] if self.spec.shape else 1) * self.spec.dtype.size
        first, last = start // row, -(-(start + len(buffer)) // row)
        rows = decode_rows(self.entry, self._stored, first, last)
        begin = start - first * row
        buffer[:] = memoryview(rows.reshape(-1).view("uint8").data)[begin : begin + len(buffer)]

    def _stored(self, offset: int, nbytes: int) -> bytearray:
        stored = bytearray(nbytes)
        self.files.read_into(self.entry.file, offset, memoryview(stored))
        return stored


def read_companion(companion: Companion) -> bytes:
    """The bytes of a companion file. Raises SourceError KB201."""
    if companion.derived:
        from kittybuild.checkpoint.gguf import derived_companion

        return derived_companion(companion.path, companion.name)
    try:
        with open(companion.path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SourceError("KB201", f"cannot read: {error.strerror}", at=companion.path) from error
