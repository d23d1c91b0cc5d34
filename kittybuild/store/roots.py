"""Roots: what garbage collection keeps. One small file for each output (a name and a folder).

So the outputs of one project are kept whatever is collected for another.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from kittybuild.digest import Digest, Json, canonical, tagged
from kittybuild.store.disk import Disk
from kittybuild.store.layout import Layout
from kittybuild.store.problems import damaged, guarded


@dataclass(frozen=True, slots=True, order=True)
class Root:
    """The manifest that an output has now.

    `also`: manifests and files beside it that are kept too; `recipe`: the path of the recipe that made it, if known.
    """

    name: str
    folder: str
    manifest: Digest
    also: tuple[Digest, ...] = ()
    recipe: str | None = None


class Roots:
    """The roots of a store."""

    def __init__(self, disk: Disk, paths: Layout) -> None:
        self._disk = disk
        self._paths = paths

    def set(self, root: Root) -> None:
        """Keep a manifest for an output, instead of the one before."""
        path = self._path(root.name, root.folder)
        form: dict[str, Json] = {"root": 1, "name": root.name, "folder": root.folder, "manifest": root.manifest.hex}
        form |= {"also": [digest.hex for digest in root.also]} if root.also else {}
        form |= {"recipe": root.recipe} if root.recipe else {}
        data = canonical(form)
        with guarded("write", path, len(data)):
            self._disk.write_file(path, data)

    def drop(self, name: str, folder: str) -> None:
        """Keep nothing for an output; absent is fine."""
        path = self._path(name, folder)
        with guarded("delete", path):
            self._disk.unlink(path)
            self._disk.sync_dir(self._paths.roots)

    def all(self) -> tuple[Root, ...]:
        """Every root; raises StoreError for one that cannot be read, since what it keeps is not known."""
        with guarded("read", self._paths.roots):
            return tuple(sorted(self.read(path) for path in self.files()))

    def files(self) -> list[str]:
        """The paths of the roots."""
        names = sorted(os.listdir(self._paths.roots))
        return [os.path.join(self._paths.roots, name) for name in names if name.endswith(".json")]

    def read(self, path: str) -> Root:
        """One root; raises StoreError if the file is not the one that its name says."""
        with open(path, "rb") as file:
            data = file.read()
        try:
            form = json.loads(data)
            recipe = form.get("recipe")
            also = tuple(Digest(digest) for digest in form.get("also", ()))
            root = Root(form["name"], form["folder"], Digest(form["manifest"]), also, recipe)
            texts = isinstance(root.name, str) and isinstance(root.folder, str) and isinstance(recipe, str | None)
            sound = form["root"] == 1 and texts and path == self._path(root.name, root.folder)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise damaged(path, "not a root", "`kittybuild store repair` sets it aside; then build its output again")
        return root

    def _path(self, name: str, folder: str) -> str:
        return self._paths.root_file(tagged("kittybuild.root.v1", [name, folder]))
