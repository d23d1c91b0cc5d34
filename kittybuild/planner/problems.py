"""All that is wrong with a recipe, when something is: what its sound stages say is looked at, too. Asks no server."""

from __future__ import annotations

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.source import Checkpoint
from kittybuild.errors import KittybuildError, each
from kittybuild.model.recipe import Recipe
from kittybuild.planner.lower import lower
from kittybuild.planner.machine import by_machine, this_machine
from kittybuild.planner.views import Sources, locate, open_all, source_names


def all_problems(
    found: list[KittybuildError], recipe: Recipe | None, builders: Builders
) -> tuple[KittybuildError, ...]:
    """What was found, and then what else is wrong with the sources of the stages in `recipe`, and with their tensors.

    Stages over sources that cannot be read, or that are on the Hub, are left alone.
    """
    told = [one for error in found for one in each(error)]
    for error in _beyond(recipe, builders) if recipe else ():
        if str(error) not in map(str, told):
            told.append(error)
    return tuple(told)


def _beyond(recipe: Recipe, builders: Builders) -> list[KittybuildError]:
    problems: list[KittybuildError] = []
    checkpoints: dict[str, Checkpoint] = {}
    paths: dict[str, str] = {}
    decls = source_names(recipe)
    for name, decl in decls.items():
        try:
            place = locate(recipe, {name: decl})
            checkpoints |= open_all(place).checkpoints
            paths |= place
        except KittybuildError as error:
            problems += each(error)
    rest = recipe.without(decls.keys() - checkpoints.keys())
    machine = this_machine(None) if any(by_machine(stage, builders) for stage in rest.stages.values()) else None
    try:
        lower(rest, tuple(rest.stages), Sources(checkpoints, paths), builders, machine)
    except KittybuildError as error:
        problems += each(error)
    return problems
