"""The header of a GGUF file: its metadata and its table of tensors.

No length in it is believed before it is checked against the file; arrays stay unread unless they are asked for.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, BinaryIO

from kittybuild.checkpoint.folder import inside
from kittybuild.checkpoint.source import FileId
from kittybuild.errors import SourceError
from kittybuild.tensors import Shape

OTHER_FILES = "use the safetensors files of the model"
LONGEST = 1 << 10  # no name or sentencepiece token of a real header comes near this,

_DAMAGED = "the file is damaged or incomplete: get it again"
_WINDOW = 1 << 20
_MOST = 1 << 24  # and no count and no text near this
_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_CODES = "BbHhIif?sAQqd"  # the value types, by number: struct's codes, s a text, A an array


def some(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass(frozen=True, slots=True)
class Unread:
    """A metadata array that nobody asked for."""

    count: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header has it, but `shape` in Hugging Face order and `offset` from the start of its file."""

    path: str
    type: str
    shape: Shape
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata and the tensor table of a GGUF file, or of all parts of a split one, tensors by GGUF names."""

    path: str
    files: tuple[FileId, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def error(self, code: str, message: str, hint: str = _DAMAGED) -> SourceError:
        """An error about this file."""
        return SourceError(code, message, at=self.path, hint=hint)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, or `default`; an error if it is of another kind."""
        value = self.metadata.get(key, default)
        if value is not None and type(value) is not kind:
            raise self.error("KB218", f"metadata {key} is not one {kind.__name__}: {value!r:.60}", OTHER_FILES)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """The positive whole number `key`."""
        value = self.get(key, int, default)
        if value is None or value < 1:
            raise self.error("KB218", f"metadata {key} is {'missing' if value is None else value}", OTHER_FILES)
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        """The positive number `key`, with the fewest digits that are the same float32."""
        import numpy

        value = self.get(key, float, default)
        if value is None or not 0 < value < math.inf:
            raise self.error("KB218", f"metadata {key} is {'missing' if value is None else value}", OTHER_FILES)
        return float(str(numpy.float32(value)))


class _Cursor:
    """Reads forward through a file and never past its end."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path, self.at = file, path, 0
        self.length = os.fstat(file.fileno()).st_size
        self._window, self._start = b"", 0

    def error(self, message: str, code: str = "KB213", hint: str = _DAMAGED) -> SourceError:
        return SourceError(code, message, at=self.path, hint=hint)

    def skip(self, count: int) -> None:
        if count > self.length - self.at:
            raise self.error(f"the header says {count} bytes at {self.at}, past the end of the file ({self.length})")
        self.at += count

    def take(self, count: int) -> bytes:
        begin = self.at - self._start
        self.skip(count)
        if begin + count > len(self._window):
            self._start, begin = self.at - count, 0
            self.file.seek(self._start)
            self._window = self.file.read(max(count, _WINDOW))
            if len(self._window) < count:
                raise self.error("the file became shorter while it was read")
        return self._window[begin : begin + count]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str, most: int = _MOST) -> int:
        number = self.number("Q")
        if number > min(most, self.length):
            raise self.error(f"the header says {number} {what}")
        return int(number)

    def text(self, most: int = _MOST) -> str:
        at = self.at
        try:
            return self.take(self.count("bytes of text", most)).decode()
        except UnicodeDecodeError:
            raise self.error(f"the text at byte {at} is not UTF-8") from None

    def kind(self) -> str:
        raw = self.number("I")
        if raw >= len(_CODES):
            raise self.error(f"the value type {raw} at byte {self.at - 4} is unknown")
        return _CODES[raw]

    def value(self, keep: bool) -> Any:
        kind = self.kind()
        if kind == "s":
            return self.text()
        return self.array(keep) if kind == "A" else self.number(kind)

    def array(self, keep: bool) -> Any:
        kind, count = self.kind(), self.count("elements")
        if kind == "A":
            raise self.error(f"an array of arrays at byte {self.at}", "KB212", OTHER_FILES)
        if keep and kind == "s":
            return tuple(self.text() for _ in range(count))
        if keep:
            return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(f"<{kind}")))
        if kind == "s":
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize(f"<{kind}"))
        return Unread(count)


def read_header(path: str, arrays: Collection[str] = ()) -> Header:
    """The header of the GGUF file at `path`; of the metadata arrays, those named in `arrays` are read."""
    try:
        known = FileId.of(path)
        with open(path, "rb") as file:
            return _header(_Cursor(file, path), known, arrays)
    except OSError as error:
        hint = "check the path and its permissions"
        raise SourceError("KB201", f"cannot be read: {error.strerror}", at=path, hint=hint) from None


def part_names(path: str) -> tuple[str, ...]:
    """The paths of all parts of a split file, by the name of one; of any other file its own."""
    match = _PART.fullmatch(path)
    if match is None or int(match[3]) < 1:
        return (path,)
    return tuple(f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1))


def read_parts(path: str) -> Header:
    """The header of the GGUF file at `path`; if it is the first part of a split one, with the tensors of all parts.

    Raises SourceError KB212 for another part, or if one is of another file, and KB201 if one is missing.
    """
    first = read_header(path)
    count = first.get("split.count", int, 1)
    if count < 2:
        return first
    names, own = part_names(path), first.get("split.no", int, 0)
    if len(names) != count or own >= count or names[own] != path:
        hint = "give the parts the names that they had: NAME-00001-of-00003.gguf and so on"
        raise first.error("KB212", f"one of {count} parts of a split GGUF file, under another name", hint)
    if own != 0:
        raise first.error("KB212", "not the first part of a split GGUF file", f"name the first: {names[0]}")
    folder = os.path.dirname(path)
    parts = [first, *(read_header(inside(folder, os.path.basename(name))) for name in names[1:])]
    for number, part in enumerate(parts):
        if (part.get("split.no", int, 0), part.get("split.count", int, 1)) != (number, count):
            raise part.error("KB212", f"not part {number + 1} of {count}", "get all parts again")
    tensors = {name: stored for part in parts for name, stored in part.tensors.items()}
    told = first.get("split.tensors.count", int, len(tensors))
    if not len(tensors) == told == sum(len(part.tensors) for part in parts):
        raise first.error("KB212", f"its parts hold {len(tensors)} tensors, not {told}", "get all parts again")
    return replace(first, files=tuple(part.files[0] for part in parts), tensors=MappingProxyType(tensors))


def _header(cursor: _Cursor, file: FileId, arrays: Collection[str]) -> Header:
    if cursor.length < 24 or cursor.take(4) != b"GGUF":
        raise cursor.error("not a GGUF file", "KB211", "check the path, and that the file is complete")
    version = cursor.number("I")
    if version not in (2, 3):
        what = "a big-endian GGUF file" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise cursor.error(f"{what} cannot be read: only little-endian versions 2 and 3", "KB212", OTHER_FILES)
    tensors, pairs = cursor.count("tensors"), cursor.count("metadata pairs")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text(LONGEST)
        if key in metadata:
            raise cursor.error(f"metadata {key} is there twice")
        metadata[key] = cursor.value(key in arrays)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= _WINDOW or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}")
    return Header(cursor.path, (file,), MappingProxyType(metadata), _table(cursor, tensors, alignment))


def _table(cursor: _Cursor, count: int, alignment: int) -> Mapping[str, Stored]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    raw: dict[str, tuple[str, Shape, int, int]] = {}
    for _ in range(count):
        name, sides = cursor.text(LONGEST), cursor.number("I")
        if name in raw or not 0 < sides <= 4:
            raise cursor.error(f"tensor {name} is there twice" if name in raw else f"{name} has {sides} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(sides))[::-1]
        number, offset = cursor.number("I"), cursor.number("Q")
        if number not in set(GGMLQuantizationType):
            raise cursor.error(f"tensor {name} has the unknown type {number}", "KB217", OTHER_FILES)
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise cursor.error(f"tensor {name} of type {kind.name} has the impossible shape {list(shape)}")
        raw[name] = (kind.name, shape, offset, math.prod(shape) // block * size)
    start, end = cursor.at + -cursor.at % alignment, 0
    for name, (_, _, offset, nbytes) in sorted(raw.items(), key=lambda item: item[1][2]):
        if offset < end or offset % alignment or start + offset + nbytes > cursor.length:
            why = "overlaps" if offset < end else "is misaligned" if offset % alignment else "ends past the file"
            raise cursor.error(f"tensor {name} ({nbytes} bytes at {start + offset}) {why}", "KB214")
        end = offset + nbytes
    return MappingProxyType(
        {name: Stored(cursor.path, kind, shape, start + at, n) for name, (kind, shape, at, n) in raw.items()}
    )
