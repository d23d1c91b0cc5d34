"""What a store holds, in numbers."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from kittybuild.digest import Json
from kittybuild.store.facts import Facts
from kittybuild.store.format import Format
from kittybuild.store.layout import PART, Layout, stored_digests
from kittybuild.store.roots import Roots


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What `store info` tells."""

    format: str
    packs: int
    pack_bytes: int
    files: int
    manifests: int
    realisations: int
    locations: int
    roots: int
    interrupted: int
    tmp_bytes: int

    def to_json(self) -> dict[str, Json]:
        """The numbers as `--json` prints them."""
        return asdict(self)


def store_info(paths: Layout, facts: Facts, roots: Roots) -> StoreInfo:
    """Count what is there; changes nothing."""
    packs = stored_digests(paths.packs, ".safetensors")
    realisations, locations = facts.counts()
    tmp = [os.path.join(folder, name) for folder, _, names in os.walk(paths.tmp) for name in names]
    return StoreInfo(
        format=Format().text,
        packs=len(packs),
        pack_bytes=sum(_size(path) for _, path in packs),
        files=len(stored_digests(paths.files)),
        manifests=len(stored_digests(paths.manifests, ".json")),
        realisations=realisations,
        locations=locations,
        roots=len(roots.files()),
        interrupted=sum(1 for path in tmp if path.endswith(PART)),
        tmp_bytes=sum(_size(path) for path in tmp),
    )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:  # another process has just finished or deleted it
        return 0
