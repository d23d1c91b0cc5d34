"""Models as stages see them: names to inputs, whoever made the tensors. And the lookup from a reference to a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kittybuild.checkpoint.folder import unknown_source
from kittybuild.checkpoint.opening import find, fingerprint, open_source, package_file
from kittybuild.checkpoint.source import RAW, Checkpoint, FileId
from kittybuild.checkpoint.sources.cached import Cached
from kittybuild.checkpoint.sources.hub import bring_entry, entry_here, identity, open_pinned
from kittybuild.checkpoint.sources.web import Web
from kittybuild.digest import Digest
from kittybuild.errors import KittybuildError, StoreError, raise_all
from kittybuild.model.derivation import Input, SourceTensor
from kittybuild.model.lock import REPOSITORY, Pin
from kittybuild.model.recipe import At, Recipe, SourceDecl

if TYPE_CHECKING:
    from kittybuild.planner.absent import Absent
    from kittybuild.planner.offers import Offers
    from kittybuild.store.store import Store


@dataclass(frozen=True)
class View:
    """A model: its tensors, the source that gives its companion files, and its config.json.

    `encoded`: the names of source tensors that are decoded while they are read. `files`: companion files that it has
    otherwise than that source (None: not at all).
    """

    label: str
    tensors: Mapping[str, Input]
    donor: str | None
    config: Mapping[str, Any] | None
    encoded: frozenset[str] = frozenset()
    files: Mapping[str, bytes | None] = field(default_factory=dict)

    @property
    def adapter(self) -> bool:
        """Whether it is no model but an adapter: its config is an adapter's."""
        return self.config is not None and "peft_type" in self.config


@dataclass(frozen=True)
class Sources:
    """The sources of a recipe by name, as their headers describe them, and where each was found."""

    checkpoints: Mapping[str, Checkpoint]
    paths: Mapping[str, str]
    remote: Mapping[str, Cached] = field(default_factory=dict)
    absent: Mapping[str, Absent] = field(default_factory=dict)

    def view(self, name: str) -> View:
        """A source as a model."""
        checkpoint = self.checkpoints[name]
        tensors = {entry.name: SourceTensor(name, entry.name, entry.spec) for entry in checkpoint.entries.values()}
        encoded = frozenset(entry.name for entry in checkpoint.entries.values() if entry.encoding != RAW)
        return View(name, tensors, name if checkpoint.companions else None, checkpoint.config, encoded)

    def identity(self, path: str) -> FileId:
        """The identity of a file: its content where a lock says it, else what `stat` does. Raises OSError."""
        for absent in self.absent.values():
            if path in absent.files:
                return absent.files[path]
        for cached in self.remote.values():
            if path.startswith(cached.view + os.sep) and (known := identity(cached, path)):
                return known
        return FileId.of(path)

    def here(self, tensor: SourceTensor) -> bool:
        """Whether the bytes of a tensor are on this machine."""
        if tensor.source in self.absent:
            return False
        cached = self.remote.get(tensor.source)
        return cached is None or entry_here(cached, self.checkpoints[tensor.source].entry(tensor.name))

    def bring(self, tensor: SourceTensor) -> None:
        """See that the bytes of a tensor are on this machine. Raises SourceError."""
        if absent := self.absent.get(tensor.source):
            raise absent.refuse()
        if cached := self.remote.get(tensor.source):
            bring_entry(cached, self.checkpoints[tensor.source].entry(tensor.name))


def source_names(recipe: Recipe) -> dict[str, SourceDecl]:
    """Every source that the stages name: declared ones by name, others by the path that is their name."""
    found: dict[str, SourceDecl] = {}
    for stage in recipe.stages.values():
        for ref in [part for named in stage.references() for part in named.parts()]:
            if ref.model not in recipe.stages:
                found.setdefault(str(ref), _declared(recipe, ref.model, ref.revision, ref.at))
    return found


def _declared(recipe: Recipe, name: str, revision: str | None, at: At) -> SourceDecl:
    known = recipe.sources.get(name)
    if known and revision is None:
        return known
    path = f"{name}@{revision}" if revision else name
    if REPOSITORY.fullmatch(name):
        return SourceDecl(path, at=at, hub=name, revision=revision, maybe=True)
    return SourceDecl(path, at=at)


def locate(recipe: Recipe, decls: Mapping[str, SourceDecl], absent: Iterable[str] = ()) -> dict[str, str]:
    """Where each source is, but for those that are on the Hub. `absent`: those that need not be here.

    Relative paths count from the recipe's folder, then from the working folder.
    """
    problems: list[KittybuildError] = []
    folders = (os.path.dirname(os.path.abspath(recipe.file)), os.getcwd())
    paths = {}
    for name, decl in decls.items():
        try:
            if decl.hub and not decl.maybe:
                continue
            path = package_file(decl.package, decl.path) if decl.package else find(decl.path, folders)
            if path is None and not decl.hub and name not in absent:
                raise unknown_source(decl.path, [*recipe.sources, *recipe.stages])
            if path is not None:
                paths[name] = path
        except KittybuildError as error:
            error.at = str(decl.at)
            problems.append(error)
    raise_all(problems)
    return paths


def open_all(paths: Mapping[str, str], pins: Mapping[str, Pin] | None = None, web: Web | None = None) -> Sources:
    """The headers of all sources; every source that cannot be read is reported. `pins`: of those that are on the Hub,
    which `web` leads to."""
    problems: list[KittybuildError] = []
    checkpoints, remote = {}, {}
    for name in (*paths, *(pins or ())):
        try:
            if name in paths:
                checkpoints[name] = open_source(paths[name])
            elif pins and web:
                checkpoints[name], remote[name] = open_pinned(pins[name], web)
        except KittybuildError as error:
            problems.append(error)
    raise_all(problems)
    return Sources(checkpoints, paths, remote)


def with_absent(sources: Sources, pins: Mapping[str, Pin], store: Store, offers: Offers) -> Sources:
    """The sources, and with them those whose files are not here. Raises SourceError KB260, all at once."""
    from kittybuild.planner.absent import open_absent

    problems: list[KittybuildError] = []
    checkpoints, absent = dict(sources.checkpoints), {}
    for name, pin in pins.items():
        try:
            checkpoints[name], absent[name] = open_absent(name, pin, store, offers)
        except StoreError:  # which has nothing to do with the source
            raise
        except KittybuildError as error:
            problems.append(error)
    raise_all(problems)
    return replace(sources, checkpoints=checkpoints, absent=absent)


def fingerprints(paths: Mapping[str, str]) -> dict[str, Digest]:
    """The identity of each source as `stat` tells it."""
    return {name: fingerprint(path) for name, path in paths.items()}
