"""One tensor at a time: what a worker is to do for it, and what is learned from what came of it.

A tensor is recorded under its resolved key only after its sources were seen to be unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xxhash import xxh3_64

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.reading import Files, RawReader
from kittybuild.digest import Digest
from kittybuild.executor.budget import block_elements, cost
from kittybuild.executor.feed import Feed, Sink
from kittybuild.executor.finite import nonfinite, not_finite
from kittybuild.executor.order import Given, Order, Report, Slot
from kittybuild.executor.workers import Workers
from kittybuild.model.derivation import Derivation, Input, SourceTensor, StageTensor, Step
from kittybuild.model.plan import inputs_of
from kittybuild.planner.known import Known
from kittybuild.store.store import Location, Store
from kittybuild.tensors import TensorRef

CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor just made: content, checksum, key (None: taken over), and how many elements are not finite."""

    ref: TensorRef
    xxh3: str
    key: Digest | None
    nonfinite: int


class Realiser:
    """Makes tensors. `share`: bytes that one worker's blocks may take. Safe to use from several threads."""

    def __init__(
        self, known: Known, store: Store, builders: Builders, workers: Workers, files: Files, share: int
    ) -> None:
        self.known, self.store, self.builders = known, store, builders
        self.workers, self.files, self.share = workers, files, share

    def cost(self, step: Step, result: int = 0) -> int:
        """The bytes of memory that making a tensor takes, with what must be made in memory for it; `result`: its own,
        where that is there, too.
        """
        own, held, most = CHUNK, 0, 0
        if isinstance(step, Derivation):
            builder = self.builders.behind(step)
            own = cost(builder, step, block_elements(builder, step, self.share))
        for given in inputs_of(step):
            if isinstance(given, StageTensor) and self._location(given) is None:
                most = max(most, held + self.cost(self.known.plan.step(given), given.spec.nbytes))
                held += given.spec.nbytes
        return max(most, held + own + result)

    def make(self, name: str, drv: Derivation, place: tuple[str, int]) -> Made:
        """Have a worker run the builder of `drv` into its place, and record what came out under the resolved key."""
        return self._learn(drv, self.workers.run(self._order(name, drv, Slot(*place))))

    def _order(self, name: str, drv: Derivation, slot: Slot | None = None) -> Order:
        return Order(name, drv, tuple(self._given(given) for given in drv.inputs), self.share, slot)

    def _given(self, given: Input) -> Given:
        ref = self.known.ref(given)
        if isinstance(given, SourceTensor):
            self.known.sources.bring(given)
            return Given(given.spec, ref, entry=self.known.entry(given))
        if location := self._location(given):
            return Given(given.spec, ref, location=location)
        return Given(given.spec, ref, first=self._order(f"{given.stage}: {given.name}", self._behind(given)))

    def _behind(self, given: StageTensor) -> Derivation:
        step = self.known.plan.step(given)
        assert isinstance(step, Derivation)  # inputs that are taken over are replaced by what they are, in the plan
        return step

    def _learn(self, drv: Derivation, report: Report) -> Made:
        for given, ref, first in zip(drv.inputs, report.inputs, report.first, strict=True):
            if first is not None and isinstance(given, StageTensor):
                self.check_finite(given.stage, given.name, self._learn(self._behind(given), first))
            self._note(given, ref)
        key = drv.key(report.inputs)
        self.store.realise({key: report.ref})
        return Made(report.ref, report.xxh3, key, report.nonfinite)

    def check_finite(self, stage: str, name: str, made: Made) -> None:
        """Record NaN and infinities; raises BuildError KB508 if a stage that does not allow them has some."""
        if made.nonfinite:
            self.store.set_nonfinite({made.ref.digest: made.nonfinite})
            if not self.known.plan.stages[stage].allow_nan:
                raise not_finite(stage, {name: made.nonfinite})

    def _note(self, given: Input, ref: TensorRef) -> None:
        if isinstance(given, SourceTensor):  # what was made of other bytes must not be recorded
            for path in self.known.entry(given).files:
                self.known.check_unchanged(path)
        if self.known.ref(given) is None:
            self.known.learn(given, ref)

    def take(self, name: str, given: Input, sink: Sink, place: tuple[str, int]) -> Made:
        """The bytes of an input as they are; what no pack holds is made straight in its place."""
        if isinstance(given, StageTensor) and self._location(given) is None:
            made = self.make(name, self._behind(given), place)
            self._note(given, made.ref)
            return made
        feed, check, count = self._feed(given), xxh3_64(), 0
        for start, part in _passing(feed):
            check.update(part)
            sink.write(start, part)
            if given.spec.dtype.is_float:
                count += nonfinite(part, given.spec.dtype)
        ref = feed.ref()
        self._note(given, ref)
        return Made(ref, check.hexdigest(), None, count)

    def digest(self, given: SourceTensor) -> TensorRef:
        """The content of a source tensor, read once if it is unknown."""
        ref = self.known.ref(given)
        if ref is None:
            feed = self._feed(given)
            for _ in _passing(feed):
                pass
            ref = feed.ref()
            self._note(given, ref)
        return ref

    def _location(self, given: StageTensor) -> Location | None:
        ref = self.known.ref(given)
        return self.known.location(ref.digest) if ref else None

    def _feed(self, given: Input) -> Feed:
        if isinstance(given, SourceTensor):
            self.known.sources.bring(given)
            return Feed(self.files.reader(self.known.entry(given)), self.known.ref(given))
        location = self._location(given)
        assert location is not None  # the caller looked
        reader = RawReader(self.files, location.path, location.offset, given.spec)
        return Feed(reader, self.known.ref(given), location.xxh3, location.path)


def _passing(feed: Feed) -> Iterator[tuple[int, memoryview]]:
    """All bytes of an input, a chunk at a time in one buffer."""
    nbytes = feed.spec.nbytes
    buffer = memoryview(bytearray(min(CHUNK, nbytes)))
    for start in range(0, nbytes, CHUNK):
        part = buffer[: min(CHUNK, nbytes - start)]
        feed.read(start, part, last=True)
        yield start, part


def remember_sources(known: Known, store: Store) -> None:
    """Keep the digests of source tensors for the next build; raises SourceError KB210 if a file changed meanwhile."""
    facts: dict[str, dict[str, Digest]] = {}
    for given, ref in known.contents():
        if isinstance(given, SourceTensor):
            entry = known.entry(given)
            facts.setdefault(entry.file, {})[known.memo_name(entry)] = ref.digest
    for path, found in facts.items():
        known.check_unchanged(path)
        store.remember(known.file_id(path).key(), found)
