"""Roots: what garbage collection keeps. One small file for each output (a name and a folder)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from kittybuild.digest import Digest, canonical, tagged
from kittybuild.store.disk import Disk
from kittybuild.store.layout import Layout
from kittybuild.store.problems import damaged, guarded


@dataclass(frozen=True, slots=True, order=True)
class Root:
    """The manifest that an output has now."""

    name: str
    folder: str
    manifest: Digest


class Roots:
    """The roots of a store."""

    def __init__(self, disk: Disk, paths: Layout) -> None:
        self._disk = disk
        self._paths = paths

    def set(self, root: Root) -> None:
        """Keep a manifest for an output, instead of the one before."""
        path = self._path(root.name, root.folder)
        form = canonical({"root": 1, "name": root.name, "folder": root.folder, "manifest": root.manifest.hex})
        with guarded("write", path, len(form)):
            self._disk.write_file(path, form)

    def drop(self, name: str, folder: str) -> None:
        """Keep nothing for an output; absent is fine."""
        path = self._path(name, folder)
        with guarded("delete", path):
            self._disk.unlink(path)
            self._disk.sync_dir(self._paths.roots)

    def all(self) -> tuple[Root, ...]:
        """Every root; raises StoreError for one that cannot be read, since what it keeps is not known."""
        with guarded("read", self._paths.roots):
            return tuple(sorted(_read(path) for path in self.files()))

    def files(self) -> list[str]:
        """The paths of the roots."""
        names = sorted(os.listdir(self._paths.roots))
        return [os.path.join(self._paths.roots, name) for name in names if name.endswith(".json")]

    def _path(self, name: str, folder: str) -> str:
        return self._paths.root_file(tagged("kittybuild.root.v1", [name, folder]))


def _read(path: str) -> Root:
    with open(path, "rb") as file:
        data = file.read()
    try:
        form = json.loads(data)
        if form["root"] == 1:
            return Root(form["name"], form["folder"], Digest(form["manifest"]))
    except (ValueError, KeyError, TypeError):
        pass
    raise damaged(path, "not a root", "delete this file, and build its output again")
