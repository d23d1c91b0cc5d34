"""From a recipe's file to all that can be said of it before a header is read; and its lock."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.checkpoint.sources.lockfile import read_lock, write_lock
from kittybuild.checkpoint.sources.web import Web
from kittybuild.digest import Digest
from kittybuild.errors import KittybuildError, RecipeError, UsageError, nearest, raise_all
from kittybuild.model.lock import Pin, differences
from kittybuild.model.recipe import Recipe, SourceDecl
from kittybuild.planner.locking import absent_pins, locked, pinned_sources
from kittybuild.planner.machine import Machine, by_machine, this_machine
from kittybuild.planner.published import published_class
from kittybuild.planner.shortcut import stage_keys
from kittybuild.planner.targets import targets
from kittybuild.planner.views import fingerprints, locate, source_names
from kittybuild.recipe.parse import parse_partly


@dataclass(frozen=True)
class Prepared:
    """A recipe with its sources found: all that can be said before a header is read.

    `paths`: the sources that lie here; `pins`: those on the Hub, which `web` leads to; `fresh`: those no lock had.
    `absent`: pins of sources whose files are left to caches.
    """

    recipe: Recipe
    wanted: tuple[str, ...]
    folders: Mapping[str, str]
    decls: Mapping[str, SourceDecl]
    paths: Mapping[str, str]
    keys: Mapping[str, Digest]
    pins: Mapping[str, Pin] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    web: Web = field(default_factory=Web)
    machine: Machine | None = None
    absent: Mapping[str, Pin] = field(default_factory=dict)


def read_recipe(file: str, builders: Builders = BUILTIN, numerics: str | None = None, offline: bool = False) -> Recipe:
    """The recipe in a file. Raises UsageError, RecipeError or Problems; with those of the text come those that the
    sources of its sound stages have, for which alone the Hub is asked, unless `offline`.

    `numerics`: the class of arithmetic of stages that name none; left out, it is the recipe's, or for the recipe of a
    published merge the one that made it.
    """
    note = None
    if numerics is None:
        numerics, note = published_class(file, builders.classes())
    recipe = recipe_of(recipe_text(file), file, builders, numerics, offline)
    return replace(recipe, notes=(note, *recipe.notes)) if note else recipe


def recipe_text(file: str) -> str:
    """The text of a recipe's file. Raises RecipeError KB100."""
    try:
        with open(file, encoding="utf-8") as text:
            return text.read()
    except OSError as error:
        raise RecipeError("KB100", f"cannot read the recipe: {error.strerror}", at=file) from error
    except UnicodeDecodeError as error:
        raise RecipeError("KB100", "the recipe is not UTF-8 text", at=file, hint="save it as UTF-8") from error


def recipe_of(
    text: str, file: str, builders: Builders = BUILTIN, numerics: str | None = None, offline: bool = False
) -> Recipe:
    """The recipe that a text says. `file` need not be there: paths count from its folder, beside it is the lock.

    Raises UsageError, RecipeError or Problems, as `read_recipe` does.
    """
    classes = builders.classes()
    if numerics is not None and numerics not in classes:
        raise UsageError("KB006", f"there are no numerics {numerics!r}", hint=nearest(numerics, classes))
    recipe, problems = parse_partly(text, file, builders.catalogue(), numerics)
    if problems and recipe:
        lock: Mapping[str, Pin] = {}
        try:
            lock = read_lock(file)
        except KittybuildError as error:
            problems.append(error)
        raise_with_the_rest(problems, recipe, source_names(recipe), lock, offline, builders)
    raise_all(problems)
    assert recipe is not None  # without problems there is one
    return recipe


def raise_with_the_rest(
    problems: list[KittybuildError],
    recipe: Recipe,
    decls: Mapping[str, SourceDecl],
    lock: Mapping[str, Pin],
    offline: bool,
    builders: Builders,
) -> None:
    """Raise these problems of a recipe, and all others that can be told already. The Hub is asked once, not again."""
    from kittybuild.planner.problems import all_problems

    raise_all(all_problems(problems, recipe, decls, lock, Web(offline=offline, tries=1), builders))


def prepare(
    recipe: Recipe,
    stages: Sequence[str] = (),
    folder: str | None = None,
    builders: Builders = BUILTIN,
    capability: str | None = None,
    offline: bool = False,
    places: Mapping[str, str] | None = None,
    lock: Mapping[str, Pin] | None = None,
    caches: bool = False,
    unread: bool = False,
) -> Prepared:
    """Find the sources and name the outputs. `folder` takes the place of the one output's own.

    Sources on the Hub are what the recipe's lock (or `lock`) says; those that it lacks are asked for, unless `offline`.
    `capability`: the instruction set that torch is told to use (ATEN_CPU_CAPABILITY), if it is told. `places`: where
    sources lie, whatever the recipe says; raises UsageError KB010 for one that it does not name. `caches`: there are
    some, so that sources need not be here if the lock has the digests of their files; `unread`: none need be read.
    """
    wanted = targets(recipe, stages)
    top = os.path.dirname(os.path.abspath(recipe.file))
    folders = {name: os.path.join(top, recipe.outputs[name].folder) for name in wanted if name in recipe.outputs}
    if folder is not None:
        if len(wanted) != 1:
            raise UsageError(
                "KB002", f"one folder for {len(wanted)} stages", hint=f"name the stage: {', '.join(wanted)}"
            )
        folders = {wanted[0]: os.path.abspath(folder)}
    decls = source_names(recipe)
    for name, path in (places or {}).items():
        _check_source(recipe, name, decls)
        decls[name] = SourceDecl(os.path.abspath(path), at=decls[name].at)
    before = read_lock(recipe.file) if lock is None else lock
    web = Web(offline=offline)
    try:
        absent = absent_pins(decls, locate(recipe, decls, before), before, unread=unread) if caches else {}
        here = {name: decl for name, decl in decls.items() if name not in absent}
        paths = locate(recipe, here)
        _check_folders(recipe, folders, paths)
        pinned = pinned_sources(here, paths, before, web)
    except KittybuildError as error:
        raise_with_the_rest([error], recipe, decls, before, offline, builders)
        raise
    depends = any(by_machine(stage, builders) for stage in recipe.stages.values())
    machine = this_machine(capability) if depends else None
    prints = fingerprints(paths) | {name: pin.fingerprint for name, pin in {**pinned.pins, **absent}.items()}
    keys = stage_keys(recipe, wanted, prints, builders, machine)
    return Prepared(recipe, wanted, folders, decls, paths, keys, pinned.pins, pinned.fresh, web, machine, absent)


@dataclass(frozen=True)
class LockReport:
    """What `lock` did: the file, its pins, and for each source that has another pin now what changed, line by line."""

    path: str
    pins: Mapping[str, Pin]
    changes: Mapping[str, tuple[str, ...]]


def lock(recipe: Recipe, update: Sequence[str] = (), offline: bool = False, builders: Builders = BUILTIN) -> LockReport:
    """Pin the sources that the recipe's lock lacks, and anew those in `update`; pins of other sources stay.

    Raises UsageError KB010 for a name that is no source; with problems of sources all others of the recipe.
    """
    decls = source_names(recipe)
    for name in update:
        _check_source(recipe, name, decls)
    before = read_lock(recipe.file)
    try:
        after = locked(decls, locate(recipe, decls), before, update, Web(offline=offline))
    except KittybuildError as error:
        raise_with_the_rest([error], recipe, decls, before, offline, builders)
        raise
    changes = {
        name: differences(before.get(name), after.get(name))
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    }
    return LockReport(write_lock(recipe.file, after), after, changes)


def _check_source(recipe: Recipe, name: str, decls: Mapping[str, SourceDecl]) -> None:
    if name not in decls:
        raise UsageError("KB010", f"there is no source {name!r}", at=recipe.file, hint=nearest(name, decls))


def _check_folders(recipe: Recipe, folders: Mapping[str, str], paths: Mapping[str, str]) -> None:
    """No output takes the place of another or of what is read, nor becomes a part of it."""
    taken = {os.path.realpath(path): f"the source {name}" for name, path in paths.items() if os.path.isdir(path)}
    for stage, folder in folders.items():
        at = str(recipe.outputs[stage].at) if stage in recipe.outputs else recipe.file
        real = os.path.realpath(folder)
        for other, what in taken.items():
            if real == other or real.startswith(other + os.sep):
                where = "is the folder of" if real == other else "lies in the folder of"
                message = f"the output folder of {stage} {where} {what}"
                raise RecipeError("KB114", message, at=at, hint="name another folder")
        taken[real] = f"the output {stage}"
