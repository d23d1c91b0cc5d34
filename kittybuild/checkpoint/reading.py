"""Reading ranges of tensors. A reader fills buffers with the tensor's own bytes, whatever lies in the file.

Files are opened once and read with positioned reads, so that any number of threads may share a Files.
"""

from __future__ import annotations

import math
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

    def same(self, one: str, two: str) -> bool:
        """Whether two paths lead to one file; raises SourceError KB201."""
        return os.path.sameopenfile(self.descriptor(one), self.descriptor(two))

    def reader(self, entry: Entry) -> Reader:
        """A reader of one tensor of a source."""
        if entry.encoding == RAW:
            return RawReader(self, entry.file, entry.offset, entry.spec)
        return RowReader(self, entry)

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


class RowReader:
    """A tensor that is decoded on the way, in whole rows. The last panel of rows is kept: the next read is in it."""

    def __init__(self, files: Files, entry: Entry) -> None:
        from kittybuild.checkpoint.decoding import decoder

        self.files, self.spec = files, entry.spec
        self._decoder = decoder(entry, self._stored)
        self._row = max(1, math.prod(self.spec.shape[-1:]) * self.spec.dtype.size)
        self._kept: tuple[int, memoryview] = 0, memoryview(b"")

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See Reader. Whole rows are decoded and the wanted bytes taken from them."""
        if start + len(buffer) > self.spec.nbytes:
            raise ValueError(f"bytes {start} to {start + len(buffer)} of {self.spec.nbytes}")
        while buffer:
            begin, data = self._kept
            if not begin <= start < begin + len(data):
                begin, data = self._decoded(start, start + len(buffer))
            part = data[start - begin : start - begin + len(buffer)]
            buffer[: len(part)] = part
            start, buffer = start + len(part), buffer[len(part) :]

    def _decoded(self, start: int, stop: int) -> tuple[int, memoryview]:
        """The rows from the one with byte `start` on: those up to byte `stop`, or the panel that it lies in."""
        panel = self._decoder.panel
        first = start // self._row // panel * panel
        last = -(-stop // self._row) if panel == 1 else min(first + panel, self.spec.nbytes // self._row)
        found = first * self._row, memoryview(self._decoder.rows(first, last).reshape(-1).view("uint8").data)
        if panel > 1:
            self._kept = found
        return found

    def _stored(self, path: str, offset: int, nbytes: int) -> bytearray:
        stored = bytearray(nbytes)
        self.files.read_into(path, offset, memoryview(stored))
        return stored


def read_companion(companion: Companion) -> bytes:
    """The bytes of a companion file. Raises SourceError KB201."""
    if companion.derived and companion.path.endswith(".gguf"):
        from kittybuild.checkpoint.gguf import derived_companion

        return derived_companion(companion.path, companion.name)
    if companion.derived:
        from kittybuild.checkpoint.folder import plain_config

        return plain_config(companion.path)
    try:
        with open(companion.path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SourceError("KB201", f"cannot read: {error.strerror}", at=companion.path) from error
