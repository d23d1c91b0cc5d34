"""Every tensor as a step, with what is known of it: reads headers, starts no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kittybuild.api.preparing import Prepared, raise_with_the_rest
from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.errors import KittybuildError
from kittybuild.model.plan import Plan
from kittybuild.planner.views import Sources, open_all, with_absent
from kittybuild.store.store import Store

if TYPE_CHECKING:
    from kittybuild.planner.decomposed import Spectra
    from kittybuild.planner.explain import Explanation
    from kittybuild.planner.known import Known
    from kittybuild.planner.offers import Offers


def plan(prepared: Prepared, store: Store | None, builders: Builders = BUILTIN, offers: Offers | None = None) -> Known:
    """Every tensor as a step, with what is known of it: reads headers, starts no torch. `Known.plan` is the plan."""
    from kittybuild.planner.spectra import known_spectra

    try:
        sources = open_all(prepared.paths, prepared.pins, prepared.web)
    except KittybuildError as error:
        pins = {**prepared.pins, **prepared.absent}
        raise_with_the_rest([error], prepared.recipe, prepared.decls, pins, prepared.web.offline, builders)
        raise
    if prepared.absent and store is not None and offers is not None:
        sources = with_absent(sources, prepared.absent, store, offers)
    known = _lowered(prepared, sources, store, builders, {}, offers)
    if known.plan.open and (spectra := known_spectra(known, known.plan.open)) is not None:
        known = _lowered(prepared, sources, store, builders, spectra, offers)
    return known


def _lowered(
    prepared: Prepared,
    sources: Sources,
    store: Store | None,
    builders: Builders,
    spectra: Spectra,
    offers: Offers | None,
) -> Known:
    from kittybuild.planner.lower import lower

    made = lower(prepared.recipe, prepared.wanted, sources, builders, prepared.machine, spectra)
    unpinned = tuple(
        f"{prepared.decls[name].at}: {name} was not in the lock: commit {prepared.pins[name].facts['commit']}"
        for name in prepared.fresh
    )
    return looked_up(replace(made, notes=(*made.notes, *unpinned)), sources, store, offers)


def looked_up(made: Plan, sources: Sources, store: Store | None, offers: Offers | None) -> Known:
    from kittybuild.planner.known import Known

    known = Known(made, sources, store, offers)
    for name in known.plan.stages:
        known.look_up(name)
    return known


def explain(
    prepared: Prepared, store: Store | None, tensor: str, builders: Builders = BUILTIN, offers: Offers | None = None
) -> tuple[Explanation, ...]:
    """What makes the tensor of that name in each stage that has it, and where its parameters come from."""
    from kittybuild.planner.explain import explanations
    from kittybuild.planner.lower import origins

    known = plan(prepared, store, builders, offers)
    of_stages = origins(prepared.recipe, prepared.wanted, known.sources, builders, prepared.machine)
    found = {name: of_tensor(tensor) for name, of_tensor in of_stages.items()}
    return explanations(known, found, prepared.recipe, tensor)
