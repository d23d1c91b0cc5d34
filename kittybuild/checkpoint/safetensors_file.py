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
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LONGEST_HEADER, size - 8):
                raise _damaged(path, f"the file has {size} bytes, but its header alone would need {8 + length}")
            header = file.read(length)
    except OSError as error:
        raise SourceError(
            "KB201", f"cannot read: {error.strerror}", at=path, hint="check the path and its rights"
        ) from error
    return _entries(path, _parse(path, header), 8 + length, size)


def _damaged(path: str, message: str) -> SourceError:
    return SourceError("KB202", f"not a whole safetensors file: {message}", at=path, hint="download or copy it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands in it twice")
    return result


def _parse(path: str, header: bytes) -> Mapping[str, Any]:
    try:
        if not header.startswith(b"{"):
            raise ValueError("the header is not JSON")
        found = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{error}") from error
    return found  # type: ignore[no-any-return]  # it starts with a brace


def _entries(path: str, header: Mapping[str, Any], start: int, size: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    end = 0
    for name, info in sorted(header.items(), key=_order):
        if name == "__metadata__":
            continue
        spec, begin, stop = _tensor(path, name, info)
        if begin != end or stop - begin != spec.nbytes:
            wanted = f"[{end}, {end + spec.nbytes})"
            raise _damaged(path, f"{name} ({spec}) lies at [{begin}, {stop}) instead of {wanted}")
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
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(stop)]} if all(
            type(side) is int and 0 <= side < 1 << 48 for side in shape
        ):
            pass
        case _:
            raise _damaged(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    try:
        return TensorSpec(DType(dtype), tuple(shape)), begin, stop
    except ValueError as error:
        hint = f"known: {', '.join(d.value for d in DType)}"
        raise SourceError(
            "KB203", f"{name} has the dtype {dtype!r}, which we do not know", at=path, hint=hint
        ) from error
