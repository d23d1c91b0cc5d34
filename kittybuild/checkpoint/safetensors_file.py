"""Headers of safetensors files, from strangers: every defect is a SourceError, and no range leaves its file.

Format: 8 bytes little-endian length, that many bytes of JSON, then the data without holes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from kittybuild.checkpoint.source import Entry
from kittybuild.errors import SourceError
from kittybuild.tensors import DType, TensorSpec

LONGEST_HEADER = 100_000_000


def read_safetensors(path: str) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, in the order of the header. Raises SourceError KB202 to KB204."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if head == b"version ":
                hint = "run `git lfs pull`"
                raise SourceError("KB202", "not the weights but a pointer of git-lfs to them", at=path, hint=hint)
            if size < 8:
                raise _damaged(path, f"the file has {size} bytes, fewer than the 8 before the header")
            if length > size - 8:
                raise _damaged(path, f"the file has {size} bytes, but its header alone would need {8 + length}")
            if length > LONGEST_HEADER:
                raise _damaged(path, f"its header has {length} bytes, more than the {LONGEST_HEADER} allowed")
            header = file.read(length)
    except OSError as error:
        raise SourceError(
            "KB201", f"cannot read: {error.strerror}", at=path, hint="check the path and its rights"
        ) from error
    return _entries(path, _parse(path, header), 8 + length, size)


def _damaged(path: str, message: str) -> SourceError:
    return SourceError("KB202", f"not a whole safetensors file: {message}", at=path, hint="download or copy it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} stands in its header twice")
        result[name] = value
    return result


def _parse(path: str, header: bytes) -> Mapping[str, Any]:
    try:
        if not header.startswith(b"{"):
            raise ValueError("the header is no JSON object")
        found = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
        for name in found:
            name.encode("utf-8")  # JSON can spell halves of characters, which nothing can write
    except (ValueError, RecursionError) as error:
        raise _damaged(path, _defect(error)) from error
    return found  # type: ignore[no-any-return]  # it starts with a brace


def _defect(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"the header is not JSON: {error.msg} at its character {error.pos}"
    return "the header is not UTF-8" if isinstance(error, UnicodeError) else str(error)


def _entries(path: str, header: Mapping[str, Any], start: int, size: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    end = 0
    for name, info in sorted(header.items(), key=_order):
        if name == "__metadata__":
            continue
        spec, begin, stop = _tensor(path, name, info)
        if begin != end or stop - begin != spec.nbytes:
            wanted = f"[{end}, {end + spec.nbytes})"
            raise _damaged(path, f"{name!r} ({spec}) lies at [{begin}, {stop}) instead of {wanted}")
        end = stop
        entries[name] = Entry(name, spec, path, start + begin, spec.nbytes)
    if start + end != size:
        raise _damaged(path, f"the header describes {start + end} bytes, the file has {size}")
    return {name: entries[name] for name in header if name in entries}


def _order(item: tuple[str, Any]) -> tuple[int, int]:
    offsets = item[1].get("data_offsets") if isinstance(item[1], dict) else None
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        return offsets[0], offsets[1]
    return -1, -1


def _tensor(path: str, name: str, info: Any) -> tuple[TensorSpec, int, int]:
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, stop]} if all(
            type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, stop)
        ):
            pass
        case _:
            raise _damaged(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    try:
        return TensorSpec(DType(dtype), tuple(shape)), begin, stop
    except ValueError as error:
        hint = f"known: {', '.join(d.value for d in DType)}"
        raise SourceError(
            "KB203", f"{name!r} has the dtype {dtype!r}, which we do not know", at=path, hint=hint
        ) from error
