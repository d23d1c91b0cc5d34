"""What is to be done for a plan, as far as is known now: what is computed, fetched, copied, taken over with a shard.

The command `plan` shows it and the executor follows it, asking again as more contents become known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kittybuild.digest import Digest
from kittybuild.model.derivation import Derivation, StageTensor, Step
from kittybuild.model.manifest import pack_digest
from kittybuild.model.plan import Plan, StagePlan, inputs_of
from kittybuild.planner.known import Known
from kittybuild.store.pack import PackLayout
from kittybuild.tensors import TensorSpec


@dataclass(frozen=True)
class Shard:
    """One shard to be: its layout, and its digest where all contents are known. `present`: its pack is in the store."""

    layout: PackLayout
    digest: Digest | None
    present: bool


@dataclass(frozen=True)
class StageWork:
    """One stage's work: shards (of a wanted stage), and the names that are computed, copied, already there, fetched."""

    stage: StagePlan
    shards: tuple[Shard, ...]
    compute: tuple[str, ...]
    copy: tuple[str, ...]
    there: tuple[str, ...]
    fetch: tuple[str, ...] = ()

    def specs(self, names: tuple[str, ...]) -> Iterator[TensorSpec]:
        """The specs of some of its tensors."""
        return (self.stage.steps[name].spec for name in names)


def layout_of(stage: StagePlan, names: tuple[str, ...]) -> PackLayout:
    """The pack that holds these tensors of a stage."""
    return PackLayout.of([(name, stage.steps[name].spec) for name in names])


def shard_work(stage: StagePlan, names: tuple[str, ...], known: Known) -> Shard:
    """One shard, as far as its contents are known."""
    layout = layout_of(stage, names)
    refs = [(name, known.ref(stage.steps[name], stage.name, name)) for name, _ in layout.tensors]
    if not all(ref for _, ref in refs):
        return Shard(layout, None, False)
    digest = pack_digest(tuple(refs))  # type: ignore[arg-type]  # all are known
    return Shard(layout, digest, known.store is not None and known.store.pack(digest) is not None)


def stage_work(plan: Plan, name: str, known: Known) -> StageWork:
    """What stage `name` needs, with what is known now."""
    stage = plan.stages[name]
    if not stage.shards:
        needed = demand(plan, known).get(name, frozenset()) if stage.keep else frozenset()
        lacking = [tensor for tensor in stage.steps if tensor in needed]
        fetch = frozenset(tensor for tensor in lacking if fetchable(known, stage.steps[tensor], name, tensor))
        made, fetched = _split(lacking, fetch)
        return StageWork(stage, (), made, (), tuple(tensor for tensor in stage.steps if tensor not in needed), fetched)
    shards = tuple(shard_work(stage, names, known) for names in stage.shards)
    there = tuple(tensor for shard in shards if shard.present for tensor, _ in shard.layout.tensors)
    rest = [tensor for shard in shards if not shard.present for tensor, _ in shard.layout.tensors]
    copy = tuple(tensor for tensor in rest if has_bytes(known, stage.steps[tensor], name, tensor))
    copied = frozenset(copy)
    lacking = [tensor for tensor in rest if tensor not in copied]
    fetch = frozenset(tensor for tensor in lacking if fetchable(known, stage.steps[tensor], name, tensor))
    made, fetched = _split(lacking, fetch)
    return StageWork(stage, shards, made, copy, there, fetched)


def _split(names: list[str], chosen: frozenset[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those that are not chosen, and those that are."""
    return tuple(n for n in names if n not in chosen), tuple(n for n in names if n in chosen)


def has_bytes(known: Known, step: Step, stage: str, name: str) -> bool:
    """Whether the content of a tensor is known and lies in the store."""
    ref = known.ref(step, stage, name)
    return ref is not None and known.location(ref.digest) is not None


def at_hand(known: Known, step: Step, stage: str, name: str) -> bool:
    """Whether a tensor need not be made."""
    return has_bytes(known, step, stage, name) or fetchable(known, step, stage, name)


def fetchable(known: Known, step: Step, stage: str, name: str) -> bool:
    """Whether the content of a tensor is known, does not lie in the store, and is to come from a cache."""
    offers = known.offers
    if offers is None or (ref := known.ref(step, stage, name)) is None or known.location(ref.digest) is not None:
        return False
    drv = known.plan.step(step) if isinstance(step, StageTensor) else step
    if isinstance(drv, Derivation) and (key := known.key(drv)) and offers.audits(key):
        return False
    here = all(known.sources.here(given) for given in known.sources_of(drv))
    return offers.worth(ref, sum(given.spec.nbytes for given in inputs_of(drv)), here=here)


def demand(plan: Plan, known: Known) -> Mapping[str, frozenset[str]]:
    """The tensors of kept intermediate stages that must be made for the wanted stages, as far as is known now.

    A tensor is needed where its content is unknown, or where a step surely runs on it and its bytes are not there.
    """
    needed: dict[str, set[str]] = {}
    seen: set[StageTensor] = set()

    def run(step: Step) -> None:
        inputs = inputs_of(step)
        sure = all(known.ref(given) for given in inputs)
        for given in inputs:
            if isinstance(given, StageTensor) and given not in seen:
                ref = known.ref(given)
                if ref is None or (sure and known.location(ref.digest) is None):
                    seen.add(given)
                    needed.setdefault(given.stage, set()).add(given.name)
                    if not fetchable(known, given, given.stage, given.name):
                        run(plan.step(given))

    for stage in plan.stages.values():
        for names in stage.shards:
            if not shard_work(stage, names, known).present:
                for name in names:
                    step = stage.steps[name]
                    if isinstance(step, (Derivation, StageTensor)) and not at_hand(known, step, stage.name, name):
                        run(step)
    return {stage: frozenset(names) for stage, names in needed.items()}
