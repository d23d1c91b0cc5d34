"""A lock: what each source was when an output was built. Facts only: no path beyond the recipe's own words, no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kittybuild.digest import Digest, Json


@dataclass(frozen=True, slots=True)
class Pin:
    """One source: the recipe's words for it, its files by name with their sizes, and a digest over its tensors.

    `content` is over (name, digest, dtype, shape) of every tensor that the build read; `read` is their number.
    `quantized`: how many of the source's tensors are stored in each quantized type.
    """

    words: Mapping[str, str]
    files: tuple[tuple[str, int], ...]
    content: Digest
    read: int
    quantized: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> Json:
        """The pin as `kittybuild.json` holds it."""
        return {
            **self.words,
            "files": [list(file) for file in self.files],
            "content": self.content.hex,
            "read": self.read,
            **({"quantized": dict(self.quantized)} if self.quantized else {}),
        }


def lock_json(pins: Mapping[str, Pin], versions: Mapping[str, str]) -> Json:
    """All pins by the names of their sources, and the versions of what built with them."""
    return {"format": 1, "sources": {name: pin.to_json() for name, pin in pins.items()}, "versions": dict(versions)}
