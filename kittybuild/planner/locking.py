"""The pins of sources: what the lock says of them, what the Hub says now, and what a finished build knows."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kittybuild import __version__
from kittybuild.checkpoint.opening import open_source, package_version, place_of
from kittybuild.checkpoint.source import Checkpoint
from kittybuild.checkpoint.sources.cached import digests
from kittybuild.checkpoint.sources.hub import pin_repository
from kittybuild.checkpoint.sources.web import Web
from kittybuild.digest import tagged
from kittybuild.errors import KittybuildError, SourceError, raise_all
from kittybuild.model.derivation import SourceTensor
from kittybuild.model.lock import FilePin, Pin
from kittybuild.model.recipe import SourceDecl

if TYPE_CHECKING:
    from kittybuild.planner.known import Known

BUILT_WITH = ("torch", "numpy", "safetensors", "blake3")


@dataclass(frozen=True)
class Pinned:
    """The pins of the sources on the Hub. `fresh`: those that no lock had; they are what the Hub says now."""

    pins: Mapping[str, Pin]
    fresh: tuple[str, ...]


def versions() -> dict[str, str]:
    """The versions of the packages that a build runs with, without starting them."""
    return {"kittybuild": __version__, **{name: package_version(name) for name in BUILT_WITH}}


def pinned_sources(
    decls: Mapping[str, SourceDecl], paths: Mapping[str, str], lock: Mapping[str, Pin], web: Web
) -> Pinned:
    """Pins for the sources that are on the Hub; those that lie here are held against the lock. Raises all problems."""
    problems: list[KittybuildError] = []
    pins, fresh = {}, []
    for name, decl in decls.items():
        pin = pin_of(lock, name, words_of(decl, paths.get(name)))
        try:
            if name in paths:
                _check_sizes(name, pin, paths[name])
            else:
                pins[name] = pin or _pin_now(decl, web)
                fresh += [] if pin else [name]
        except KittybuildError as error:
            error.at = error.at or str(decl.at)
            problems.append(error)
    raise_all(problems)
    return Pinned(pins, tuple(fresh))


def absent_pins(
    decls: Mapping[str, SourceDecl], paths: Mapping[str, str], lock: Mapping[str, Pin], *, unread: bool = False
) -> dict[str, Pin]:
    """The pins of sources of which a file is not here, where the lock has the SHA-256 of every file.

    `unread`: also of those that are here, for who will not read them.
    """
    found = {}
    for name, decl in decls.items():
        path = paths.get(name)
        pin = pin_of(lock, name, words_of(decl, path))
        if pin is None or (decl.hub and path is None) or not all(file.sha256 for file in pin.files):
            continue
        if unread or path is None or not all(os.path.exists(place_of(path, file.name)) for file in pin.files):
            found[name] = pin
    return found


def words_of(decl: SourceDecl, path: str | None) -> dict[str, str]:
    """The words by which a pin knows its source. `path`: where it lies, if it is not on the Hub."""
    return (replace(decl, hub=None) if path else decl).words


def pin_of(lock: Mapping[str, Pin], name: str, words: Mapping[str, str]) -> Pin | None:
    """The pin of a source, if it is about what the recipe says now."""
    pin = lock.get(name)
    return pin if pin and pin.words == words else None


def _pin_now(decl: SourceDecl, web: Web) -> Pin:
    try:
        return pin_repository(decl.words, web)
    except SourceError as error:
        if decl.maybe and error.code in ("KB250", "KB251"):
            error.hint = f"no file or folder here is called {decl.path} either; {error.hint}"
        raise


def _check_sizes(name: str, pin: Pin | None, path: str) -> None:
    for file in pin.files if pin else ():
        place = place_of(path, file.name)
        size = os.stat(place).st_size if os.path.isfile(place) else None
        if size != file.size:
            found = "is not there" if size is None else f"has {size} bytes"
            hint = f"if the change is meant: `kittybuild lock RECIPE --update {name}`"
            raise SourceError("KB256", f"{file.name} {found}, the lock says {file.size}", at=path, hint=hint)


def new_pin(decl: SourceDecl, path: str | None, web: Web) -> Pin:
    """What a source is now: on the Hub its commit, here its files with their digests. Raises SourceError."""
    if path is None:
        return _pin_now(decl, web)
    files = [replace(file, sha256=digests(real)[0]) for real, file in _files(path, open_source(path))]
    return Pin(words_of(decl, path), tuple(files), _facts(decl))


def locked(
    decls: Mapping[str, SourceDecl],
    paths: Mapping[str, str],
    lock: Mapping[str, Pin],
    update: Collection[str],
    web: Web,
) -> dict[str, Pin]:
    """Pins of all sources: those of the lock, and new ones for what it lacks or what is in `update`."""
    problems: list[KittybuildError] = []
    found = {}
    for name, decl in decls.items():
        pin = None if name in update else pin_of(lock, name, words_of(decl, paths.get(name)))
        try:
            found[name] = pin or new_pin(decl, paths.get(name), web)
        except KittybuildError as error:
            error.at = error.at or str(decl.at)
            problems.append(error)
    raise_all(problems)
    return found


def _facts(decl: SourceDecl) -> dict[str, str]:
    return {"version": package_version(decl.package)} if decl.package else {}


def _files(path: str, checkpoint: Checkpoint) -> list[tuple[str, FilePin]]:
    """The files of a source that lies here, each with where it really is, by their names in it."""
    names = {}
    for folder, _, listed in os.walk(path):
        for name in listed:
            full = os.path.join(folder, name)
            names[os.path.realpath(full)] = os.path.relpath(full, path).replace(os.sep, "/")
    found = [
        (file.path, FilePin(names.get(file.path) or os.path.basename(file.path), file.size))
        for file in checkpoint.files
    ]
    return sorted(found, key=lambda item: item[1].name)


def pins(known: Known, decls: Mapping[str, SourceDecl], pinned: Mapping[str, Pin]) -> dict[str, Pin]:
    """One pin for each source of a finished build, in the recipe's order. `pinned`: of those on the Hub."""
    read: dict[str, list[list[object]]] = {}
    for given, ref in known.contents():
        if isinstance(given, SourceTensor):
            read.setdefault(given.source, []).append([given.name, *ref.to_json()])
    found = {}
    for name, checkpoint in known.sources.checkpoints.items():
        path = known.sources.paths.get(name)
        if path is None:
            pin = pinned[name]
        else:
            files = tuple(file for _, file in _files(path, checkpoint))
            pin = Pin(words_of(decls[name], path), files, _facts(decls[name]))
        tensors = sorted(read.get(name, []), key=lambda item: str(item[0]))
        found[name] = replace(
            pin,
            content=tagged("kittybuild.pin.v1", tensors),
            read=len(tensors),
            quantized=tuple(sorted(checkpoint.quantized.items())),
        )
    return {name: found[name] for name in decls if name in found}
