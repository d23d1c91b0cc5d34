"""Merge methods from outside: of installed packages, and of files that a person names. A recipe can name neither.

A plug-in has a version, or the digest of its source file in place of one: what it makes is never taken for what
another source made.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from types import ModuleType

from kittybuild.builders.base import Builder, Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.digest import Digest
from kittybuild.errors import KittybuildError, UsageError, raise_all
from kittybuild.model.derivation import KITTY_1

GROUP = "kittybuild.methods"
_REPAIR = "repair it, or take it out"

Origin = tuple[str, Callable[[], Sequence[Builder]]]
"""Where builders come from, and how to get them."""


def load(files: Sequence[str] = ()) -> Builders:
    """The builders of kittybuild, those of installed packages, and those that these Python files define at top level.

    Raises UsageError or Problems.
    """
    problems: list[KittybuildError] = []
    origins: dict[tuple[str, str], str] = dict.fromkeys(BUILTIN.by_class, "kittybuild itself")
    found = []
    named: list[Origin] = [(file, partial(_of_file, file)) for file in files]
    for where, open_it in (*_installed(), *named):
        try:
            for builder in open_it():
                _check(builder, where, origins)
                found.append(builder if builder.version else replace(builder, version=_digest(builder)))
                origins[builder.numerics, builder.name] = where
        except KittybuildError as error:
            error.at = error.at or where
            problems.append(error)
    raise_all(problems)
    if not found:
        return BUILTIN
    return replace(BUILTIN.plus(*found), files=tuple(os.path.abspath(file) for file in files))


def _installed() -> list[Origin]:
    """The entry points of installed packages, by package, and how to open each."""
    entries = sorted(metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
    return [(entry.dist.name if entry.dist else entry.value, partial(_of_entry, entry)) for entry in entries]


def _of_entry(entry: metadata.EntryPoint) -> Sequence[Builder]:
    value = _run(entry.load)
    builders = (value,) if isinstance(value, Builder) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not builders or not all(isinstance(builder, Builder) for builder in builders):
        message = f"the entry point {entry.name!r} is neither a Builder nor a sequence of them"
        raise UsageError("KB007", message, hint=f"{_REPAIR}: see docs/plugins.md")
    return builders


def _of_file(file: str) -> Sequence[Builder]:
    """The builders that stand at the top level of a Python file, without those that it imports from kittybuild."""
    name = f"kittybuild_methods_{Digest.of(os.path.abspath(file).encode()).hex[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not os.path.isfile(file):
        raise UsageError("KB007", "not a Python file", hint="--methods takes a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in it look themselves up
    _run(partial(spec.loader.exec_module, module))
    builders = _top_level(module)
    if not builders:
        raise UsageError("KB007", "the file defines no Builder", hint="see docs/plugins.md for one that does")
    return builders


def _top_level(module: ModuleType) -> tuple[Builder, ...]:
    known = {id(builder) for builder in BUILTIN.by_class.values()}
    values = {id(value): value for value in vars(module).values() if isinstance(value, Builder)}
    return tuple(value for key, value in values.items() if key not in known)


def _run(work: Callable[[], object]) -> object:
    """What foreign code gives; whatever it raises is its own error, told in one line."""
    try:
        return work()
    except Exception as error:
        message = f"cannot be loaded: {type(error).__name__}: {error}"
        raise UsageError("KB007", message, hint=_REPAIR) from error


def _check(builder: Builder, where: str, origins: dict[tuple[str, str], str]) -> None:
    if builder.method is None or builder.method.name != builder.name:
        message = f"{builder.name!r} has no Method of its own name"
        raise UsageError("KB007", message, hint="give the Builder `method=Method(name=...)`")
    if builder.numerics != KITTY_1:
        message = f"{builder.name!r} is of the class {builder.numerics!r}"
        raise UsageError("KB007", message, hint=f"plug-ins are of {KITTY_1}: leave `numerics` out")
    if other := origins.get((builder.numerics, builder.name)):
        raise UsageError("KB008", f"{builder.name!r} is the name of a builder of {other}", hint="give it another name")


def _digest(builder: Builder) -> str:
    """The digest of the source file that holds a builder's `prepare`."""
    try:
        with open(inspect.getsourcefile(inspect.unwrap(builder.prepare)) or "", "rb") as source:
            return f"source {Digest.of(source.read())}"
    except (OSError, TypeError) as error:
        message = f"{builder.name!r} has no version, and no source file whose digest could stand for it"
        raise UsageError(
            "KB007", message, hint="give the Builder a version, and raise it when its bits change"
        ) from error


__all__ = ["GROUP", "load"]
