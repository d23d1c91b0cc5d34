"""The journal of an unfinished pack: first which tensors it is for, then one line for each that is finished.

A line is the XXH3-64 of its JSON, a space, and the JSON. Reading ends at the first line that is cut or damaged: what a
journal claims is only ever used after the bytes themselves were verified, so it needs no sync of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_64_hexdigest

from kittybuild.digest import Digest, Json
from kittybuild.store.pack import PackLayout
from kittybuild.tensors import TensorRef, TensorSpec

JOURNAL_VERSION = 1


@dataclass(frozen=True, slots=True)
class Finished:
    """One finished tensor of a pack: content, quick checksum if known, and the key of its derivation if it has one."""

    name: str
    ref: TensorRef
    xxh3: str | None
    key: Digest | None

    def line(self) -> bytes:
        """The journal's line."""
        return _line([self.name, self.ref.to_json(), self.xxh3, self.key.hex if self.key else None])


def first_line(tensors: Iterable[tuple[str, TensorSpec]]) -> bytes:
    """The line that a journal begins with."""
    return _line({"journal": JOURNAL_VERSION, "tensors": [[name, *spec.to_json()] for name, spec in tensors]})


def read_journal(path: str) -> tuple[PackLayout, dict[str, Finished]] | None:
    """The layout and the finished tensors; None if there is no journal, or not even its first line is whole."""
    try:
        with open(path, "rb") as file:
            lines = [_value(line) for line in file]
    except FileNotFoundError:
        return None
    try:
        layout = _layout(lines[0])
    except (IndexError, ValueError, KeyError, TypeError):
        return None
    finished: dict[str, Finished] = {}
    for value in lines[1:]:
        try:
            entry = _finished(value)
            if layout.spec(entry.name) != entry.ref.spec:
                break
        except (ValueError, KeyError, TypeError):
            break
        finished[entry.name] = entry
    return layout, finished


def _line(value: Json) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _value(line: bytes) -> Json:
    """The JSON of a line; None for a line that is cut or damaged (no line of ours is null)."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != xxh3_64_hexdigest(text).encode():
        return None
    try:
        value: Json = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def _layout(value: Json) -> PackLayout:
    match value:
        case {"journal": 1, "tensors": [*rows]}:
            return PackLayout.of(_named_spec(row) for row in rows)
    raise ValueError("not the first line of a journal")


def _named_spec(row: Any) -> tuple[str, TensorSpec]:
    name, dtype, shape = row
    return str(name), TensorRef.from_json(["0" * 64, dtype, shape]).spec


def _finished(value: Json) -> Finished:
    match value:
        case [str(name), [*ref], str() | None as xxh3, str() | None as key]:
            return Finished(name, TensorRef.from_json(ref), xxh3, Digest(key) if key else None)
    raise ValueError("not a line of a journal")
