"""A recipe planned or built by one call: what `kittybuild.plan` and `kittybuild.build` are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import yaml

from kittybuild import api
from kittybuild.builders.registry import BUILTIN
from kittybuild.model.recipe import Recipe
from kittybuild.store.store import Store

if TYPE_CHECKING:
    from kittybuild.planner.estimate import Estimate

RecipeLike = str | os.PathLike[str] | Mapping[str, Any]


def default_store() -> str:
    """The store that is used where none is named: the one in the user's cache. No environment variable is asked."""
    return os.path.join(os.path.expanduser("~"), ".cache", "kittybuild", "store")


def read(recipe: RecipeLike, numerics: str | None = None, offline: bool = False) -> Recipe:
    """A recipe from its file, or from plain data (relative paths then count from the working folder).

    Raises RecipeError or Problems.
    """
    if isinstance(recipe, Mapping):
        text = yaml.safe_dump(dict(recipe), sort_keys=False)
        return api.recipe_of(text, "python.recipe", BUILTIN, numerics, offline)
    return api.read_recipe(os.fspath(recipe), BUILTIN, numerics, offline)


def build(
    recipe: RecipeLike,
    stages: Sequence[str] = (),
    *,
    output: str | None = None,
    store: str | None = None,
    memory: int = api.MEMORY,
    jobs: int = 1,
    numerics: str | None = None,
    offline: bool = False,
) -> api.BuildReport:
    """Build the outputs of a recipe, or some stages, as `kittybuild build` does; only what changed is computed.

    `output`: the folder of the one wanted stage, in place of the recipe's. `memory` is in bytes. Raises a
    KittybuildError; what was finished is kept.
    """
    prepared = api.prepare(read(recipe, numerics, offline), stages, output, offline=offline)
    with Store.open(store or default_store()) as opened:
        return api.build(prepared, opened, memory=memory, jobs=jobs)


def plan(
    recipe: RecipeLike,
    stages: Sequence[str] = (),
    *,
    store: str | None = None,
    memory: int = api.MEMORY,
    jobs: int = 1,
    numerics: str | None = None,
    offline: bool = False,
) -> Estimate:
    """What `build` would compute, link, read and write, from headers alone. Makes no store."""
    from kittybuild.planner.estimate import estimate

    prepared = api.prepare(read(recipe, numerics, offline), stages, offline=offline)
    folder = store or default_store()
    with Store.open(folder) if Store.exists(folder) else nullcontext() as opened:
        return estimate(api.plan(prepared, opened), BUILTIN, memory=memory, jobs=jobs)
