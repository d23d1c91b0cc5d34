"""All that is wrong with a recipe, when something is: its sound stages are looked at, too, with their sources."""

from __future__ import annotations

from collections.abc import Mapping

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.source import Checkpoint
from kittybuild.checkpoint.sources.cached import Cached
from kittybuild.checkpoint.sources.web import Web
from kittybuild.errors import KittybuildError, each
from kittybuild.model.lock import Pin
from kittybuild.model.recipe import Recipe, SourceDecl
from kittybuild.planner.locking import absent_pins, pinned_sources
from kittybuild.planner.lower import lower
from kittybuild.planner.machine import by_machine, this_machine
from kittybuild.planner.views import Sources, locate, open_all


def all_problems(
    found: list[KittybuildError],
    recipe: Recipe,
    decls: Mapping[str, SourceDecl],
    lock: Mapping[str, Pin],
    web: Web,
    builders: Builders,
) -> tuple[KittybuildError, ...]:
    """What was found, and then what else is wrong with the sources (`decls`) of the stages in `recipe`, and with their
    tensors.

    Stages over sources that cannot be read, or that a cache may have, are left alone.
    """
    told = [one for error in found for one in each(error)]
    for error in _beyond(recipe, decls, lock, web, builders):
        if str(error) not in map(str, told):
            told.append(error)
    return tuple(told)


def _beyond(
    recipe: Recipe, decls: Mapping[str, SourceDecl], lock: Mapping[str, Pin], web: Web, builders: Builders
) -> list[KittybuildError]:
    problems: list[KittybuildError] = []
    checkpoints: dict[str, Checkpoint] = {}
    remote: dict[str, Cached] = {}
    paths: dict[str, str] = {}
    for name, decl in decls.items():
        one = {name: decl}
        try:
            place = locate(recipe, one, lock)
            if absent_pins(one, place, lock):
                continue
            opened = open_all(place, pinned_sources(one, place, lock, web).pins, web)
        except KittybuildError as error:
            problems += each(error)
        else:
            checkpoints |= opened.checkpoints
            remote |= opened.remote
            paths |= place
    rest = recipe.without(decls.keys() - checkpoints.keys())
    machine = this_machine(None) if any(by_machine(stage, builders) for stage in rest.stages.values()) else None
    try:
        lower(rest, tuple(rest.stages), Sources(checkpoints, paths, remote), builders, machine)
    except KittybuildError as error:
        problems += each(error)
    return problems
