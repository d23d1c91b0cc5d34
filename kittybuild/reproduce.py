"""A merge built again and compared: a published one from the recipe inside it, or a build in an empty store.

Nothing is written but stores: the rebuild is compared as it lies there, tensor by tensor.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kittybuild import api
from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.digest import Digest
from kittybuild.errors import BuildError, KittybuildError, Problems, SourceError
from kittybuild.model.made import first_cause, read_derivations
from kittybuild.model.manifest import Manifest
from kittybuild.model.method import find
from kittybuild.model.recipe import MergeStage
from kittybuild.publish.compare import (
    CLOSE,
    DIFFERENT,
    IDENTICAL,
    NAMES,
    OTHER_DTYPE,
    OTHER_SHAPE,
    Compared,
    compare,
    only,
)
from kittybuild.publish.diff import kept_entries
from kittybuild.publish.published import Published
from kittybuild.store.store import Store

if TYPE_CHECKING:
    from kittybuild.executor.events import Events


@dataclass(frozen=True)
class Limits:
    """What a rebuild may use, as `api.build` takes it; `fresh`: it starts with nothing in an empty store."""

    memory: int = api.MEMORY
    jobs: int = 1
    processes: bool = True
    fresh: bool = False


@dataclass(frozen=True)
class Reproduction:
    """How a rebuild compares with what was published. `cause`: the first reason for a difference, as far as known.

    `computed` tensors were made for it, `cached` ones came from the store.
    """

    published: Published
    numerics: tuple[str, ...]
    tensors: tuple[Compared, ...]
    cause: str | None
    computed: int
    cached: int
    notes: tuple[str, ...]

    def apart(self, within: int | None = None) -> tuple[Compared, ...]:
        """The tensors that are not the same. `within`: so many units in the last place are the same."""
        return tuple(one for one in self.tensors if not one.within(within))

    def to_json(self) -> dict[str, Any]:
        """As `reproduce --json` prints it."""
        counts = Counter(one.how for one in self.tensors)
        kinds = (IDENTICAL, CLOSE, DIFFERENT, *map(only, NAMES), OTHER_DTYPE, OTHER_SHAPE)
        return {
            "of": self.published.where,
            "recipe": self.published.found_in,
            "stage": self.published.stage,
            "numerics": list(self.numerics),
            "tensors": {kind.replace(" ", "_"): counts[kind] for kind in kinds},
            "ulps": max((one.ulps or 0 for one in self.tensors), default=0),
            "differences": [one.to_json() for one in self.tensors if one.how != IDENTICAL],
            "cause": self.cause,
            "computed": self.computed,
            "cached": self.cached,
            "notes": list(self.notes),
        }


def reproduce(
    published: Published,
    store: Store,
    *,
    places: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    builders: Builders = BUILTIN,
    capability: str | None = None,
    offline: bool = False,
    events: Events | None = None,
) -> Reproduction:
    """Build a published merge again, in the store, and compare. Raises what a build raises.

    `places`: where sources lie, by their names in the recipe; others are looked for where the recipe says.
    """
    limits = limits or Limits()
    with _named_sources():
        prepared = api.prepare(
            published.recipe,
            [published.stage],
            None,
            builders,
            capability,
            offline,
            places,
            published.lock,
        )
    prepared = replace(prepared, fresh=())  # the folder, or the cache it is in, gets no lock
    with _place(store, limits.fresh) as opened:
        report = _build(prepared, opened, limits, events, builders)
        manifest = _manifest(opened, report.stages[published.stage].manifest)
        made = {tensor.name: tensor.ref.digest for tensor in manifest.tensors}
        found = list(compare(published.tensors, kept_entries(manifest, opened), made))
        told = json.loads(api.record(prepared, opened) or b"{}")
    merges = [stage for stage in prepared.recipe.stages.values() if isinstance(stage, MergeStage)]
    return Reproduction(
        published,
        tuple(dict.fromkeys(stage.numerics for stage in merges)),
        tuple(one for one, _ in found),
        _cause(published, found, told, merges, builders),
        report.stages[published.stage].computed,
        report.stages[published.stage].cached,
        (*published.notes, *report.notes),
    )


def rebuilt(
    prepared: api.Prepared,
    report: api.BuildReport,
    store: Store,
    *,
    limits: Limits,
    builders: Builders = BUILTIN,
    events: Events | None = None,
) -> tuple[str, ...]:
    """Build all of a finished build again in an empty store; what came out otherwise, one line each."""
    found = []
    with _place(store, fresh=True) as other:
        again = _build(replace(prepared, fresh=(), folders={}), other, limits, events, builders)
        for name in prepared.wanted:
            if again.stages[name].manifest != report.stages[name].manifest:
                before = _manifest(store, report.stages[name].manifest)
                found += list(_differences(name, before, _manifest(other, again.stages[name].manifest)))
    return tuple(found)


def _differences(stage: str, one: Manifest, two: Manifest) -> Iterator[str]:
    before, after = ({**_by_name(manifest)} for manifest in (one, two))
    for kind, name in dict.fromkeys((*before, *after)):
        if before.get((kind, name)) != after.get((kind, name)):
            yield f"{stage}: {kind} {name}"


def _by_name(manifest: Manifest) -> dict[tuple[str, str], object]:
    tensors: dict[tuple[str, str], object] = {("tensor", one.name): (one.ref, one.key) for one in manifest.tensors}
    shards = {("shard", str(number)): shard for number, shard in enumerate(manifest.shards, 1)}
    return {**tensors, **{("file", file.name): file for file in manifest.files}, **shards}


def _build(
    prepared: api.Prepared, store: Store, limits: Limits, events: Events | None, builders: Builders
) -> api.BuildReport:
    return api.build(
        prepared,
        store,
        memory=limits.memory,
        jobs=limits.jobs,
        processes=limits.processes,
        events=events,
        builders=builders,
    )


@contextmanager
def _place(store: Store, fresh: bool) -> Iterator[Store]:
    """The store; or an empty one that is gone afterwards, on the same disk, since it becomes as large as the output."""
    if not fresh:
        yield store
        return
    beside = tempfile.TemporaryDirectory(prefix=".kittybuild-", dir=os.path.dirname(store.root))
    with beside as folder, Store.open(os.path.join(folder, "store")) as empty:
        yield empty


@contextmanager
def _named_sources() -> Iterator[None]:
    """Sources that are not where the recipe says have a way out here that they have nowhere else."""
    try:
        yield
    except KittybuildError as error:
        for one in error.errors if isinstance(error, Problems) else (error,):
            if isinstance(one, SourceError) and one.code in ("KB201", "KB251"):
                one.hint = f"say where it is: --source NAME=PATH{f' ({one.hint})' if one.hint else ''}"
        raise


def _manifest(store: Store, digest: Digest) -> Manifest:
    manifest = store.manifest(digest)
    if manifest is None:
        raise BuildError("KB506", f"the store has lost the manifest {digest}", hint="run it again")
    return manifest


def _cause(
    published: Published,
    found: Sequence[tuple[Compared, Digest | None]],
    told: Mapping[str, Any],
    merges: Sequence[MergeStage],
    builders: Builders,
) -> str | None:
    """Why the first tensor that differs does, as far as the folder and the rebuild can tell."""
    apart = [(one, digest) for one, digest in found if one.how != IDENTICAL]
    if not apart:
        return None
    said = published.said
    if said:
        for one, digest in apart:
            ref = said.tensors.get(one.name)
            if digest != (ref.digest if ref else None):
                return f"{one.name} is not what the folder's kittybuild.json says: it was changed after the build"
        return _other_build(published, told, apart[0][0].name)
    first = apart[0][0]
    if first.how not in (CLOSE, DIFFERENT):
        return f"{first}: the sources are others, or the recipe was changed"
    for stage in merges:
        method = find(builders.methods(stage.numerics), stage.method)
        if method and method.random:
            return f"{stage.method} draws random numbers, and nothing says which {stage.numerics} drew"
    if all(one.how == CLOSE and (one.ulps or 0) <= 1 for one, _ in apart):
        return "rounding alone differs: it was made by another version, or on another kind of machine"
    few = len(apart) <= len(found) // 10
    what = (
        "these tensors were changed after the merge, or in a source" if few else "the sources or the recipe are others"
    )
    return f"{first.name} is the first of {len(apart)} that differ: {what}"


def _other_build(published: Published, told: Mapping[str, Any], tensor: str) -> str:
    """Why a build of ours came out otherwise now: other sources, another derivation, or other bits of the same one."""
    said = published.said
    assert said is not None  # the caller looked
    now = told.get("lock", {}).get("sources", {})
    for name, pin in said.lock.get("sources", {}).items():
        if name in now and pin.get("content") != now[name].get("content"):
            return f"the source {name} holds other tensors than the one that was merged"
    stages = published.stage, published.stage
    cause = first_cause(said.derivations, read_derivations(told.get("derivations", {})), stages, tensor)
    return cause or f"{tensor}: the same derivation made other bits: please report it"
