"""Where everything in a store lies: paths, and the listing of what has a content name."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kittybuild.digest import Digest

PART = ".part"
JOURNAL = ".journal"
TEMPORARY = ".tmp"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of the store at `root`, which is absolute."""

    root: str

    @property
    def format(self) -> str:
        """The file that makes the folder a store."""
        return os.path.join(self.root, "FORMAT")

    @property
    def reserve(self) -> str:
        """The file that is deleted when the disk is full."""
        return os.path.join(self.root, "reserve")

    @property
    def folders(self) -> tuple[str, ...]:
        """Every folder that a new store has."""
        names = ("packs", "files", "index", "manifests", "roots", "tmp", "locks")
        return tuple(os.path.join(self.root, name) for name in names)

    @property
    def packs(self) -> str:
        """The folder of the packs."""
        return os.path.join(self.root, "packs")

    @property
    def files(self) -> str:
        """The folder of the companion files."""
        return os.path.join(self.root, "files")

    @property
    def manifests(self) -> str:
        """The folder of the manifests."""
        return os.path.join(self.root, "manifests")

    @property
    def index(self) -> str:
        """The folder of the index database."""
        return os.path.join(self.root, "index")

    @property
    def roots(self) -> str:
        """The folder of the roots."""
        return os.path.join(self.root, "roots")

    @property
    def tmp(self) -> str:
        """The folder of unfinished packs."""
        return os.path.join(self.root, "tmp")

    def pack(self, digest: Digest) -> str:
        """The path of a pack."""
        return os.path.join(self.packs, digest.hex[:2], f"{digest.hex}.safetensors")

    def file(self, digest: Digest) -> str:
        """The path of a companion file."""
        return os.path.join(self.files, digest.hex[:2], digest.hex)

    def manifest(self, digest: Digest) -> str:
        """The path of a manifest."""
        return os.path.join(self.manifests, digest.hex[:2], f"{digest.hex}.json")

    def root_file(self, key: Digest) -> str:
        """The path of a root."""
        return os.path.join(self.roots, f"{key.hex}.json")

    def lock(self, name: str) -> str:
        """The path of a lock: `store` (held while the store is open), `index`, `tmp`, or that of an output folder."""
        return os.path.join(self.root, "locks", name)


def stored_digests(folder: str, suffix: str = "") -> list[tuple[Digest, str]]:
    """The content-named files in a folder of `ab/<digest><suffix>`, sorted; other names are not ours and left alone."""
    found = []
    for prefix in _names(folder):
        for name in _names(os.path.join(folder, prefix)):
            stem = name.removesuffix(suffix) if name.endswith(suffix) else ""
            if _is_digest(stem) and stem.startswith(prefix):
                found.append((Digest(stem), os.path.join(folder, prefix, name)))
    return sorted(found)


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
