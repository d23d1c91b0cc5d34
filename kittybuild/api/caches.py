"""What was built, to remote caches and from them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kittybuild.api.building import built
from kittybuild.api.planning import plan
from kittybuild.api.preparing import Prepared
from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.errors import RemoteError
from kittybuild.store.store import Store

if TYPE_CHECKING:
    from kittybuild.executor.events import Events
    from kittybuild.planner.offers import Offers
    from kittybuild.publish.pull import Pulled
    from kittybuild.publish.push import Pushed, Pushing


def push(prepared: Prepared, store: Store, to: Pushing, builders: Builders = BUILTIN) -> Pushed:
    """Push what was built of a recipe to a cache, signed. Raises RemoteError KB806 if it is not built."""
    from kittybuild.publish.push import push

    if ready := built(prepared, store):
        to = replace(to, name=to.name or prepared.recipe.name)
        return push(to, store, ready[0], prepared.wanted, plan(prepared, store, builders))
    hint = "build it with the same recipe, lock and store, then push"
    raise RemoteError("KB806", "not everything is built", at=prepared.recipe.file, hint=hint)


def pull(prepared: Prepared, store: Store, offers: Offers, events: Events, builders: Builders = BUILTIN) -> Pulled:
    """Bring what caches have of the outputs into the store; computes nothing."""
    from kittybuild.publish.pull import pull

    return pull(plan(prepared, store, builders, offers), store, events)
