"""The file FORMAT: what makes a folder a store, its version, and what a program must know to use it or delete in it.

`kittybuild-store VERSION`, then a line `use FEATURE` or `delete FEATURE` for each thing that not every program of that
version knows. Who does not know a feature may not do that operation; so an old program may still build where it must
not collect.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from kittybuild.store.disk import Disk
from kittybuild.store.layout import Layout
from kittybuild.store.locks import held
from kittybuild.store.problems import guarded, other_format
from kittybuild.store.reading import small_file
from kittybuild.store.reserve import make_reserve

VERSION = 2
KNOWN: frozenset[tuple[str, str]] = frozenset()
USE, DELETE = "use", "delete"
_TEXT = re.compile(rb"kittybuild-store ([1-9][0-9]{0,5})\n((?:(?:use|delete) [a-z0-9-]+\n)*)")


@dataclass(frozen=True)
class Format:
    """A version, and the features that operations need."""

    version: int = VERSION
    needs: frozenset[tuple[str, str]] = KNOWN

    @classmethod
    def parse(cls, data: bytes) -> Format | None:
        """The format of a file; None if it is no such file, or damaged."""
        found = _TEXT.fullmatch(data)
        if found is None:
            return None
        lines = (line.split(" ") for line in found[2].decode().splitlines())
        return cls(int(found[1]), frozenset((operation, feature) for operation, feature in lines))

    def to_bytes(self) -> bytes:
        """The file."""
        lines = "".join(f"{operation} {feature}\n" for operation, feature in sorted(self.needs))
        return f"kittybuild-store {self.version}\n{lines}".encode()

    @property
    def text(self) -> str:
        """As a person reads it."""
        return ", ".join(self.to_bytes().decode().splitlines())

    def unknown(self, operation: str) -> list[str]:
        """The features that we would have to know for an operation."""
        return sorted(feature for needed, feature in self.needs - KNOWN if needed in (USE, operation))


def checked_format(paths: Layout, operation: str) -> Format | None:
    """The format of a store; None if there is none yet. Raises StoreError KB702 if we may not do `operation` in it."""
    data = small_file(paths.format)
    if data is None:
        return None
    found = Format.parse(data)
    if found is None or found.version > VERSION or found.unknown(operation):
        text = data[:80].decode(errors="replace").strip() if found is None else found.text
        raise other_format(paths.root, text, Format().text)
    return found


def migrate(disk: Disk, paths: Layout, patience: float) -> None:
    """Bring an older store to our version, alone: who has it open believes the older one. Cut short, it begins anew.

    1 to 2: a reserve, and FORMAT may have lines for features; roots may say more.
    """
    with guarded("migrate", paths.root), held(disk, paths.lock("store"), exclusive=True, patience=patience):
        now = Format.parse(small_file(paths.format) or b"")
        if now is not None and now.version == 1:  # another process may have been first
            make_reserve(disk, paths)
            disk.write_file(paths.format, Format(VERSION, now.needs).to_bytes(), mode=0o644)


def mend_format(disk: Disk, root: str) -> bool:
    """Write a FORMAT that is damaged, or lost, anew, if the folder is a store otherwise; whether that was done."""
    paths = Layout(os.path.abspath(root))
    data = small_file(paths.format) if os.path.isdir(paths.root) else None
    if (data is not None and Format.parse(data)) or not all(os.path.isdir(folder) for folder in paths.folders):
        return False
    with guarded("write", paths.format):
        disk.write_file(paths.format, Format().to_bytes(), mode=0o644)
    return True
