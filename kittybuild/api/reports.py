"""What a build did, as values that print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kittybuild.digest import Digest, Json


@dataclass(frozen=True)
class StageReport:
    """What a build did for one stage."""

    tensors: int
    computed: int
    cached: int
    manifest: Digest
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    fetched: int = 0

    def to_json(self) -> dict[str, Json]:
        """As `build --json` prints it."""
        counts: dict[str, Json] = {
            "tensors": self.tensors,
            "computed": self.computed,
            "cached": self.cached,
            "fetched": self.fetched,
        }
        return {**counts, "manifest": self.manifest.hex, "nonfinite": dict(self.nonfinite)}


@dataclass(frozen=True)
class OutputReport:
    """What a build did for one output folder."""

    folder: str
    shards_written: int
    shards_linked: int

    def to_json(self) -> dict[str, Json]:
        """As `build --json` prints it."""
        return {"folder": self.folder, "shards_written": self.shards_written, "shards_linked": self.shards_linked}


@dataclass(frozen=True)
class BuildReport:
    """What a build did. Bytes are those of tensors; seconds are the wall's.

    `workers_peak`: the most bytes of memory that worker processes took, beside this one. `bytes_fetched`: those that
    came over the network after the headers.
    """

    stages: Mapping[str, StageReport]
    outputs: Mapping[str, OutputReport]
    bytes_read: int
    bytes_written: int
    workers_peak: int
    seconds: float
    notes: tuple[str, ...] = ()
    bytes_fetched: int = 0
