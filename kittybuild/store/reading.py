"""Reading stored bytes and hashing them in the same pass."""

from __future__ import annotations

import os
from collections.abc import Iterator

from blake3 import blake3
from xxhash import xxh3_64

from kittybuild.digest import Digest

_BLOCK = 1 << 20


def blocks(fd: int, offset: int, nbytes: int) -> Iterator[memoryview]:
    """The bytes of a range, block by block in one buffer; ends early where the file does."""
    buffer = memoryview(bytearray(min(_BLOCK, nbytes)))
    while nbytes > 0:
        count = os.preadv(fd, [buffer[: min(len(buffer), nbytes)]], offset)
        if count == 0:
            return
        yield buffer[:count]
        offset += count
        nbytes -= count


def digests(fd: int, offset: int, nbytes: int) -> tuple[Digest, str]:
    """The digest and the XXH3-64 of a range."""
    strong, quick = blake3(), xxh3_64()
    for block in blocks(fd, offset, nbytes):
        strong.update(block)
        quick.update(block)
    return Digest(strong.hexdigest()), quick.hexdigest()


def quick_digest(fd: int, offset: int, nbytes: int) -> str:
    """The XXH3-64 of a range."""
    quick = xxh3_64()
    for block in blocks(fd, offset, nbytes):
        quick.update(block)
    return quick.hexdigest()


def small_file(path: str) -> bytes | None:
    """The whole of a small file; None if it is absent."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
