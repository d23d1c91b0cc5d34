"""Runs a plan: stage after stage, shard after shard, tensors side by side. What is there is taken, the rest made.

Every finished tensor is journalled with its pack, so that a run cut short anywhere leaves its work to the next one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.reading import Files
from kittybuild.digest import Digest
from kittybuild.errors import BuildError, KittybuildError
from kittybuild.executor.budget import Budget
from kittybuild.executor.crew import Crew
from kittybuild.executor.events import Events
from kittybuild.executor.finite import not_finite
from kittybuild.executor.order import needs_torch
from kittybuild.executor.realise import Made, Realiser, remember_sources
from kittybuild.executor.substitute import check_claim, substituted
from kittybuild.executor.workers import Processes, Threads, Workers
from kittybuild.model.derivation import Derivation, SourceTensor, StageTensor, Step
from kittybuild.model.manifest import ManifestShard
from kittybuild.model.plan import StagePlan
from kittybuild.planner.known import Known
from kittybuild.planner.lower import DEFAULT_SHARD, shards_of
from kittybuild.planner.recall import PROBES_PER_HIT, probes, recalled, unresolved
from kittybuild.planner.work import Shard, StageWork, fetchable, has_bytes, layout_of, stage_work
from kittybuild.store.problems import DamagedTensor
from kittybuild.store.store import Location, Store
from kittybuild.store.writer import PATIENCE, PackWriter
from kittybuild.tensors import TensorRef

MOST_DAMAGED = 100
CLAIM_PAUSE = 0.2
Fill = Callable[[str, float | None], bool]
FLUSH_EVERY = 512_000_000
OPEN_PACKS = 8


@dataclass
class StageResult:
    """What happened to one stage. `shards` are its packs, in order."""

    tensors: int
    computed: int = 0
    fetched: int = 0
    written: int = 0
    linked: int = 0
    shards: list[ManifestShard] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much memory (bytes) and how many workers a run may use; `processes`: workers of their own, else threads."""

    memory: int
    jobs: int
    processes: bool = True


@dataclass(frozen=True, slots=True)
class Amounts:
    """Bytes of tensors read and written, and the most memory that worker processes took together."""

    read: int
    written: int
    workers: int


Ran = tuple[dict[str, StageResult], Amounts]
"""What happened to each stage, and how much went through."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be built, and with what; `results` count over all attempts, `costs` are seconds by tensor."""

    known: Known
    store: Store
    builders: Builders
    limits: Limits
    workers: Workers
    events: Events
    results: dict[str, StageResult]
    costs: dict[Digest, float] = field(default_factory=dict)


def run(known: Known, store: Store, builders: Builders, limits: Limits, events: Events) -> Ran:
    """Build all stages of the plan. Damaged tensors in the store are set aside and made again."""
    results = {name: StageResult(len(stage.steps)) for name, stage in known.plan.stages.items()}
    kind = Processes if limits.processes else Threads
    with kind(limits.jobs, builders, store.disk) as workers:
        return results, _until_sound(_Job(known, store, builders, limits, workers, events, results))


def _until_sound(job: _Job) -> Amounts:
    """Attempt after attempt, until none meets damage."""
    known, store, damaged = job.known, job.store, set[str]()
    while True:
        try:
            return _attempt(job, Known(known.plan, known.sources, store, known.offers) if damaged else known)
        except DamagedTensor as damage:
            if damage.path in damaged or len(damaged) == MOST_DAMAGED:
                message = f"damaged tensors turn up again and again: {damage.message}"
                hint = "is the disk well? Name another store with --store"
                raise BuildError("KB505", message, at=damage.path, hint=hint) from damage
            damaged.add(damage.path)
            if os.path.exists(damage.path):  # else it has only moved, as packs do when they are finished
                job.events.note(f"{damage.path} is damaged: it is set aside and its tensors are made again")
            store.discard(damage.path)
            store.salvage()  # what this attempt finished
            job.workers.forget_files()


def _attempt(job: _Job, known: Known) -> Amounts:
    """One attempt. `known`: what it believes."""
    try:
        with Files() as files, Crew(job.limits.jobs, job.workers.interrupt) as crew:
            attempt = _Run(job, known, files, crew)
            attempt.all_stages()
            read = files.bytes_read + job.workers.bytes_read
            amounts = Amounts(read, attempt.written, job.workers.peak_memory)
    except BaseException:
        with suppress(KittybuildError):  # the first error counts
            _remember(known, job)
        raise
    _remember(known, job)
    return amounts


def _remember(known: Known, job: _Job) -> None:
    """Keep what was learned of the sources for later builds, and all of it for this one."""
    for given, ref in known.contents():
        job.known.learn(given, ref)
    remember_sources(known, job.store)
    job.store.set_costs(job.costs)


class _Run:
    """One attempt."""

    def __init__(self, job: _Job, known: Known, files: Files, crew: Crew) -> None:
        self.known, self.store, self.events, self.crew, self.results = known, job.store, job.events, crew, job.results
        self.workers, self.costs = job.workers, job.costs
        self.budget = Budget(job.limits.memory)
        share = self.budget.total // job.limits.jobs
        self.realiser = Realiser(known, job.store, job.builders, job.workers, files, share)
        self.written = self.unflushed = 0
        self.announced: set[SourceTensor] = set()
        self.counting = threading.Lock()
        self.disappointed: Future[None] = Future()

    def all_stages(self) -> None:
        """Build all stages, one after the other."""
        for name in self.known.plan.stages:
            self.known.forget_places()
            self.known.look_up(name)
            self._recall(name)
            self._stage(name, self.results[name])
        self._digest_the_rest()

    def _recall(self, name: str) -> None:
        """Digest unknown sources before anything is made, if a few show that the store knows what is made of them."""
        steps = self.known.plan.stages[name].steps
        waiting = unresolved(steps, self.known)
        tried = probes(waiting)
        self._digest(name, [given for tensor in tried for given in waiting[tensor]])
        hits = sum(recalled(self.known, steps[tensor], name, tensor) for tensor in tried)
        if hits and PROBES_PER_HIT * hits >= len(tried):
            self._digest(name, [given for missing in waiting.values() for given in missing])

    def _digest(self, name: str, sources: list[SourceTensor]) -> None:
        for done in [self.crew.make(partial(self.realiser.digest, given)) for given in dict.fromkeys(sources)]:
            self.crew.result(done)
        if sources:
            self.known.look_up(name)

    def _stage(self, name: str, result: StageResult) -> None:
        work = stage_work(self.known.plan, name, self.known)
        stage = work.stage
        self._check_known(stage)
        result.shards.clear()
        result.linked = result.written = 0
        self.events.stage(name, sum(spec.nbytes for spec in work.specs((*work.compute, *work.copy, *work.fetch))))
        shards: Iterable[Shard] = work.shards
        if not stage.shards:
            making = {name: step for name, step in stage.steps.items() if name in {*work.compute, *work.fetch}}
            shards = [
                Shard(layout_of(stage, names), None, False) for names in shards_of(making, DEFAULT_SHARD) if names
            ]
        self._start(work, work.compute)
        begun: list[tuple[Shard, Future[ManifestShard]]] = []
        for index, shard in enumerate(shards):
            begun.append((shard, self._shard(stage, shard, result)))
            if index >= OPEN_PACKS:
                self._result(work, begun[index - OPEN_PACKS][1])
        for shard, done in begun:
            result.shards.append(self._result(work, done))
            result.linked += shard.present
            result.written += not shard.present
            self.written += 0 if shard.present else shard.layout.size

    def _start(self, work: StageWork, names: Iterable[str]) -> None:
        """Start the workers if one of these tensors is made by them."""
        drvs = [drv for name in names if (drv := self._behind(work.stage.steps[name]))]
        if drvs:
            self.workers.start(torch=any(map(needs_torch, drvs)))

    def _result(self, work: StageWork, done: Future[ManifestShard]) -> ManifestShard:
        """The shard when it is done. If fetching fails meanwhile, there must be workers: this is the thread for it."""
        if work.fetch:
            either: list[Future[Any]] = [done, self.disappointed]
            wait(either, return_when=FIRST_COMPLETED)
            if self.disappointed.done():
                self._start(work, (*work.compute, *work.fetch))
        return self.crew.result(done)

    def _behind(self, step: Step) -> Derivation | None:
        """The derivation behind a step; None for a source's tensor."""
        step = self.known.plan.step(step) if isinstance(step, StageTensor) else step
        return step if isinstance(step, Derivation) else None

    def _check_known(self, stage: StagePlan) -> None:
        """What the store has may hold NaN that another stage allowed."""
        refs = {name: self.known.ref(step, stage.name, name) for name, step in stage.steps.items()}
        counts = self.store.nonfinite([ref.digest for ref in refs.values() if ref]) if not stage.allow_nan else {}
        if counts:
            known = {name: ref.digest for name, ref in refs.items() if ref}
            raise not_finite(stage.name, {name: counts[digest] for name, digest in known.items() if digest in counts})

    def _shard(self, stage: StagePlan, shard: Shard, result: StageResult) -> Future[ManifestShard]:
        """Begin a shard; the future is done when its pack is in the store."""
        names = tuple(name for name, _ in shard.layout.tensors)
        if shard.present and shard.digest is not None:
            ready: Future[ManifestShard] = Future()
            ready.set_result(ManifestShard(shard.digest, shard.layout.size, names))
            return ready
        writer = self.store.write_pack(shard.layout.tensors)
        fill = partial(self._fill, stage, writer, result)
        tasks = [self._begin(stage, writer, result, name, fill) for name in names]
        return self.crew.finish(partial(self._finish, writer, tasks, fill, names))

    def _finish(
        self, writer: PackWriter, tasks: list[Future[bool]], fill: Fill, names: tuple[str, ...]
    ) -> ManifestShard:
        """The pack of finished tensors; one that is cut short is left for the next run to salvage."""
        try:
            deadline = time.monotonic() + PATIENCE
            while busy := [name for name, task in zip(names, tasks, strict=True) if not task.result()]:
                patience = CLAIM_PAUSE if time.monotonic() < deadline else None
                again = {name: self.crew.make(partial(fill, name, patience)) for name in busy}
                tasks = [again.get(name, task) for name, task in zip(names, tasks, strict=True)]
            pack = writer.finish()
        except BaseException:
            wait(tasks)
            writer.abandon()
            raise
        return ManifestShard(pack.digest, pack.size, names)

    def _begin(self, stage: StagePlan, writer: PackWriter, result: StageResult, name: str, fill: Fill) -> Future[bool]:
        """Begin a tensor: those that are fetched wait for the network, and not for makers."""
        make = partial(fill, name, 0.0)
        if fetchable(self.known, stage.steps[name], stage.name, name):
            return self.crew.fetch(partial(self._fetch, stage, writer, result, name, make))
        return self.crew.make(make)

    def _fetch(
        self, stage: StagePlan, writer: PackWriter, result: StageResult, name: str, make: Callable[[], bool]
    ) -> bool:
        """Fetch a tensor, if that still pays; else have it made."""
        step = stage.steps[name]
        made = None
        if fetchable(self.known, step, stage.name, name):
            made = substituted(self.known, step, stage.name, name, _Slot(writer, name))
        if made is None:
            with self.counting:
                if not self.disappointed.done():
                    self.disappointed.set_result(None)
            return self.crew.make(make).result()
        writer.done(name, made.ref, made.xxh3, made.key)
        with self.counting:
            result.fetched += 1
        self.realiser.check_finite(stage.name, name, made)
        self.events.advance(step.spec.nbytes)
        self._flush_now_and_then(writer, step.spec.nbytes)
        return True

    def _fill(
        self, stage: StagePlan, writer: PackWriter, result: StageResult, name: str, patience: float | None
    ) -> bool:
        """One tensor into its place in a pack; False if another process is just making it."""
        step = stage.steps[name]
        drv = self._behind(step)
        if has_bytes(self.known, step, stage.name, name):
            self._copy(writer, name, self.known.ref(step, stage.name, name))
        elif drv is not None:
            if not self._leased(stage, writer, result, name, drv, patience):
                return False
        elif isinstance(step, SourceTensor | StageTensor):
            with self.budget.admit(self.realiser.cost(step)):
                made = self.realiser.take(name, step, _Slot(writer, name), writer.place(name))
            self._done(stage, writer, name, made, result)
        self.events.advance(step.spec.nbytes)
        self._flush_now_and_then(writer, step.spec.nbytes)
        return True

    def _leased(
        self,
        stage: StagePlan,
        writer: PackWriter,
        result: StageResult,
        name: str,
        drv: Derivation,
        patience: float | None,
    ) -> bool:
        """Make a tensor, or take it from whoever has made it meanwhile; False if somebody is at it just now."""
        lease = self.known.lease(drv)
        if patience is not None and not self.store.leases.take(lease, patience):
            return False
        try:
            if not self._take_over(stage, writer, name, drv):
                self._make(stage, writer, result, name, drv)
        finally:
            self.store.leases.free(lease)
        return True

    def _make(self, stage: StagePlan, writer: PackWriter, result: StageResult, name: str, drv: Derivation) -> None:
        step = stage.steps[name]
        with self.budget.admit(self.realiser.cost(drv)):
            begun = time.monotonic()
            made = self.realiser.make(f"{stage.name}: {name}", drv, writer.place(name))
            self.costs[made.ref.digest] = time.monotonic() - begun
        check_claim(self.known, made, f"{stage.name}: {name}")
        self.known.learn(step if isinstance(step, StageTensor) else StageTensor(stage.name, name, step.spec), made.ref)
        self._done(stage, writer, name, made, result)
        refs = {given: self.known.ref(given) for given in self.known.sources_of(drv)}
        news = {given: ref.digest for given, ref in refs.items() if ref is not None and given not in self.announced}
        writer.announce(name, {self.known.memo_key(given): digest for given, digest in news.items()})
        self.announced |= set(news)

    def _take_over(self, stage: StagePlan, writer: PackWriter, name: str, drv: Derivation) -> bool:
        """Copy what another process has made since we looked; False if nobody has, or it is gone."""
        found = self.known.ask_again(drv)
        while found is not None and (location := self._location(found[1].digest)) is not None:
            try:
                writer.copy(name, found[1], location, found[0])
            except DamagedTensor:
                if os.path.exists(location.path):
                    raise
                continue  # its pack was finished, and lies elsewhere now
            self.known.learn(StageTensor(stage.name, name, drv.spec), found[1])
            step = stage.steps[name]
            if isinstance(step, StageTensor):
                self.known.learn(step, found[1])
            return True
        return False

    def _flush_now_and_then(self, writer: PackWriter, nbytes: int) -> None:
        """Send data to the disk while there is work to do, so that little is left to wait for at the end."""
        with self.counting:
            self.unflushed += nbytes
            due = self.unflushed >= FLUSH_EVERY
            if due:
                self.unflushed = 0
        if due:
            self.crew.sync(writer.flush)

    def _copy(self, writer: PackWriter, name: str, ref: TensorRef | None) -> None:
        location = self.known.location(ref.digest) if ref else None
        assert ref is not None  # the caller looked
        assert location is not None
        try:
            writer.copy(name, ref, location)
        except DamagedTensor:
            moved = None if os.path.exists(location.path) else self._location(ref.digest)
            if moved is None:
                raise
            writer.copy(name, ref, moved)

    def _location(self, digest: Digest) -> Location | None:
        """Where a tensor lies now. A pack that is finished between two looks has another path: hence the second."""
        return self.store.location(digest) or self.store.location(digest)

    def _done(self, stage: StagePlan, writer: PackWriter, name: str, made: Made, result: StageResult) -> None:
        writer.done(name, made.ref, made.xxh3, made.key)
        with self.counting:
            result.computed += 1
        self.realiser.check_finite(stage.name, name, made)

    def _digest_the_rest(self) -> None:
        """Contents that a manifest lists but nobody read."""
        for stage in self.known.plan.stages.values():
            for step in stage.steps.values():
                if isinstance(step, SourceTensor) and self.known.ref(step) is None:
                    self.realiser.digest(step)


@dataclass(frozen=True, slots=True)
class _Slot:
    """One tensor's place in a pack, as a sink."""

    writer: PackWriter
    name: str

    def write(self, offset: int, data: memoryview) -> None:
        """See Sink."""
        self.writer.write(self.name, offset, data)
