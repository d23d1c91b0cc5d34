"""Digests, and the only encoding that is ever hashed.

A Digest is BLAKE3-256. Values are hashed as a domain tag, a zero byte, and their canonical JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

Json = None | bool | int | str | Sequence["Json"] | Mapping[str, "Json"]

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The BLAKE3-256 of some bytes, written as 64 hex digits."""

    hex: str

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.hex):
            raise ValueError(f"not a digest: {self.hex!r}")

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Digest:
        """The digest of `data`."""
        return cls(blake3(data).hexdigest())

    def __str__(self) -> str:
        return self.hex


def hexed(value: Any) -> Json:
    """`value` with each float written as `float.hex()`, so that its text has all its bits."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): hexed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hexed(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"cannot be hashed: {type(value).__name__}")


def canonical(value: Json) -> bytes:
    """The canonical JSON of a value without floats: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def tagged(tag: str, value: Any) -> Digest:
    """The digest of a value in the domain `tag`; floats count by all their bits."""
    return Digest.of(tag.encode() + b"\0" + canonical(hexed(value)))
