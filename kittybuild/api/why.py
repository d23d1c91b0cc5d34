"""What changed since the last build of each output: its recipe and what it told are read back, and compared."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kittybuild.api.building import built
from kittybuild.api.planning import plan
from kittybuild.api.preparing import Prepared, prepare, recipe_of
from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.errors import KittybuildError
from kittybuild.model.made import Derivations, read_derivations
from kittybuild.model.manifest import Manifest
from kittybuild.store.store import Store

if TYPE_CHECKING:
    from kittybuild.planner.causes import Before, Lowered
    from kittybuild.planner.known import Known
    from kittybuild.planner.offers import Offers
    from kittybuild.planner.why import Why


@dataclass(frozen=True)
class _Last:
    """What is known of the last build of an output, and from where. `text`: its recipe, if that is known."""

    where: str
    stage: str
    manifest: Manifest
    made: Derivations
    text: str | None = None
    numerics: str | None = None


def why(
    prepared: Prepared,
    store: Store | None,
    builders: Builders = BUILTIN,
    *,
    offers: Offers | None = None,
    tensor: str | None = None,
    capability: str | None = None,
) -> tuple[Why, ...]:
    """What changed for each wanted stage since its last build, and what a build would do about it. Reads no weights.

    The last build is what the output folder's kittybuild.json tells; without a folder, what the store remembers of this
    recipe. `tensor`: the one whose chain of causes is asked for. `capability`: see `prepare`. Raises a KittybuildError.
    """
    from kittybuild.planner.why import explained, nothing

    lasts = {name: _last(prepared, store, name) for name in prepared.wanted}
    ready = built(prepared, store) if store is not None and tensor is None else None
    same = {name: last for name, last in lasts.items() if last and ready and last.manifest == ready[0][name]}
    if len(same) == len(lasts):
        return tuple(
            nothing(name, prepared.folders.get(name), last.where, last.manifest) for name, last in same.items()
        )
    now = _lowered(prepared, builders, plan(prepared, store, builders, offers))
    found = []
    for name, last in lasts.items():
        before = _before(prepared, now, last, store, builders, capability) if last else None
        files = _files(now, name, last, store) if last else ()
        told = last.where if last else None
        found.append(explained(now, name, prepared.folders.get(name), before, told, files=files, tensor=tensor))
    return tuple(found)


def _last(prepared: Prepared, store: Store | None, name: str) -> _Last | None:
    """The last build of a stage; None if nothing tells of one. Raises VerifyError KB602 for a damaged telling."""
    from kittybuild.publish.folder import PROVENANCE
    from kittybuild.publish.provenance import has_provenance, read_provenance

    folder, recipe = prepared.folders.get(name), os.path.abspath(prepared.recipe.file)
    roots = [root for root in store.roots() if root.name == name] if store else []
    roots = [root for root in roots if root.folder == folder or (folder is None and root.recipe == recipe)]
    for place in (folder, *(root.folder for root in roots)):
        if place and has_provenance(place):
            said = read_provenance(place)
            return _Last(
                os.path.join(place, PROVENANCE), said.stage, said.manifest, said.derivations, said.text, said.numerics
            )
    for root in roots:
        assert store is not None  # the roots are from it
        manifest = store.manifest(root.manifest)
        record = store.read_file(root.also[0]) if root.also else None
        if manifest and record:
            made = read_derivations(json.loads(record)["derivations"])
            return _Last(f"the store {store.root}", name, manifest, made)
    return None


def _lowered(prepared: Prepared, builders: Builders, known: Known) -> Lowered:
    from kittybuild.planner.causes import Lowered
    from kittybuild.planner.lower import origins

    found = origins(prepared.recipe, prepared.wanted, known.sources, builders, prepared.machine)
    return Lowered(prepared.recipe, known, found)


def _before(
    prepared: Prepared, now: Lowered, last: _Last, store: Store | None, builders: Builders, capability: str | None
) -> Before:
    """The last build, with its recipe lowered as if it were built today, where that can be done."""
    from kittybuild.planner.causes import Before
    from kittybuild.recipe.changes import text_changes

    if last.text is None:
        return Before(last.stage, last.manifest, last.made)
    recipe = prepared.recipe
    texts = text_changes(last.text, recipe.text, recipe.file)
    then: Lowered | None = now
    if texts or last.numerics != recipe.numerics or last.stage not in prepared.wanted:
        try:
            old = recipe_of(last.text, recipe.file, builders, last.numerics, offline=True)
            again = prepare(old, (last.stage,), None, builders, capability, offline=True, lock=prepared.pins)
            known = plan(again, None, builders)  # only what it says is compared, and not what is known of it
            then = _lowered(again, builders, plan(again, store, builders) if known.plan.open else known)
        except KittybuildError:  # a source that is gone, or a word that nobody knows any more
            then = None
    return Before(last.stage, last.manifest, last.made, then, texts)


def _files(now: Lowered, name: str, last: _Last, store: Store | None) -> tuple[str, ...]:
    from kittybuild.publish.companions import other_companions

    return other_companions(now.known.plan.stages[name], now.known.sources, last.manifest, store)
