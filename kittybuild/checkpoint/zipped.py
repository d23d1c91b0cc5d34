"""Zip files as torch writes them: where the bytes of each member lie. Nothing is unpacked.

Every member lies inside the file and shares no byte with another; one that is packed is marked.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from kittybuild.checkpoint.bounded import Bounded
from kittybuild.errors import SourceError

LARGEST_DIRECTORY = 16 << 20
AGAIN = "download or copy it again"

_LOCAL = struct.Struct("<4s22xHH")
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class Member:
    """The bytes of one member, from `offset` of the file on. `packed`: compressed or encrypted."""

    offset: int
    nbytes: int
    packed: bool


def read_members(path: str, file: BinaryIO) -> dict[str, Member]:
    """The members of the zip file at `path`, open as `file`, by name. Raises SourceError KB220 or KB223."""
    try:
        bounded = Bounded(file, LARGEST_DIRECTORY, "its directory")
        with zipfile.ZipFile(cast("BinaryIO", bounded)) as found:
            listed = found.infolist()
        return dict(_members(path, file, listed))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, IndexError) as error:
        message = f"not a whole zip file: {error}"
        raise SourceError("KB220", message, at=path, hint=AGAIN) from error


def _members(path: str, file: BinaryIO, listed: list[zipfile.ZipInfo]) -> Iterator[tuple[str, Member]]:
    size, end, before = os.fstat(file.fileno()).st_size, 0, ""
    names: set[str] = set()
    for info in sorted(listed, key=lambda info: info.header_offset):
        name = info.filename
        if name in names:
            raise ValueError(f"{name!r} is in it twice")
        if info.header_offset < end:
            raise SourceError("KB223", f"{name!r} in it overlaps with {before!r}", at=path, hint=AGAIN)
        file.seek(info.header_offset)
        magic, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
        if magic != b"PK\x03\x04" or file.read(name_length) != info.orig_filename.encode(_encoding(info)):
            raise ValueError(f"{name!r} does not lie where the directory says")
        start = info.header_offset + _LOCAL.size + name_length + extra_length
        end, before = start + info.compress_size, name
        if end > size:
            message = f"{name!r} in it ends at byte {end}, the file has {size}"
            raise SourceError("KB223", message, at=path, hint=AGAIN)
        names.add(name)
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        yield name, Member(start, info.file_size, packed=not stored or bool(info.flag_bits & _ENCRYPTED))


def _encoding(info: zipfile.ZipInfo) -> str:
    return "utf-8" if info.flag_bits & 0x800 else "cp437"
