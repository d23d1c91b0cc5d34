"""One tensor at a time: find its inputs' bytes, run its builder over them, learn its content and its key.

An input whose bytes are nowhere is made in memory first, and so on down: nothing of it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from xxhash import xxh3_64

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.reading import Files, RawReader
from kittybuild.digest import Digest
from kittybuild.errors import BuildError, KittybuildError
from kittybuild.executor.blocks import Feed, Output, Sink, StreamJob, nonfinite, torch_dtype
from kittybuild.executor.budget import block_elements, cost, streamed
from kittybuild.model.derivation import Derivation, Input, SourceTensor, StageTensor, Step
from kittybuild.model.plan import inputs_of
from kittybuild.planner.known import Known, memo_name
from kittybuild.store.store import Location, Store
from kittybuild.tensors import TensorRef, TensorSpec

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor just made: content, checksum, key (None: taken over), and how many elements are not finite."""

    ref: TensorRef
    xxh3: str
    key: Digest | None
    nonfinite: int


class Scratch:
    """A tensor in memory: a sink while it is made, then a reader."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self._bytes = bytearray(spec.nbytes)

    def write(self, offset: int, data: memoryview) -> None:
        """See Sink."""
        self._bytes[offset : offset + len(data)] = data

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See Reader."""
        buffer[:] = memoryview(self._bytes)[start : start + len(buffer)]


class Realiser:
    """Makes tensors. `share`: bytes that one worker's blocks may take. Safe to use from several threads."""

    def __init__(self, known: Known, store: Store, files: Files, builders: Builders, share: int) -> None:
        self.known, self.store, self.files, self.builders, self.share = known, store, files, builders, share

    def cost(self, step: Step) -> int:
        """The bytes of memory that making a tensor takes, with what must be made in memory for it."""
        own = CHUNK
        if isinstance(step, Derivation):
            builder = self.builders.behind(step)
            own = cost(builder, step, block_elements(builder, step, self.share))
        return own + sum(self._made_for(given) for given in inputs_of(step))

    def _made_for(self, given: Input) -> int:
        if isinstance(given, SourceTensor) or self._location(given) is not None:
            return 0
        return given.spec.nbytes + self.cost(self.known.plan.step(given))

    def make(self, name: str, drv: Derivation, sink: Sink) -> Made:
        """Run the builder of `drv` into `sink`, and record what came out under the resolved key."""
        builder = self.builders.behind(drv)
        feeds = tuple(self._feed(given) for given in drv.inputs)
        job = StreamJob(drv, feeds, streamed(builder, drv), block_elements(builder, drv, self.share))
        output = Output(drv.output, sink)
        try:
            job.run(builder.prepare(job), output)
        except KittybuildError as error:
            error.at = error.at or name
            raise
        except (MemoryError, RuntimeError) as error:
            hint = "if memory ran out: fewer --jobs, a smaller --memory"
            raise BuildError("KB501", f"{drv.builder} failed: {error}", at=name, hint=hint) from error
        refs = [self._learned(given, feed) for given, feed in zip(drv.inputs, feeds, strict=True)]
        ref, xxh3 = output.result()
        key = drv.key(refs)
        self.store.realise({key: ref})
        return Made(ref, xxh3, key, output.nonfinite)

    def take(self, given: Input, sink: Sink) -> Made:
        """The bytes of an input as they are."""
        feed, check, count = self._feed(given), xxh3_64(), 0
        for start, part in _passing(feed):
            check.update(part)
            sink.write(start, part)
            if given.spec.dtype.is_float:
                count += nonfinite(torch.frombuffer(part, dtype=torch_dtype(given.spec.dtype)))
        return Made(self._learned(given, feed), check.hexdigest(), None, count)

    def digest(self, given: SourceTensor) -> TensorRef:
        """The content of a source tensor, read once if it is unknown."""
        ref = self.known.ref(given)
        if ref is None:
            feed = self._feed(given)
            for _ in _passing(feed):
                pass
            ref = self._learned(given, feed)
        return ref

    def _location(self, given: StageTensor) -> Location | None:
        ref = self.known.ref(given)
        return self.known.location(ref.digest) if ref else None

    def _feed(self, given: Input) -> Feed:
        if isinstance(given, SourceTensor):
            return Feed(self.files.reader(self.known.entry(given)), self.known.ref(given))
        location = self._location(given)
        if location:
            reader = RawReader(self.files, location.path, location.offset, given.spec)
            return Feed(reader, self.known.ref(given), location.xxh3, location.path)
        step = self.known.plan.step(given)
        assert isinstance(step, Derivation)  # inputs that are taken over are replaced by what they are, in the plan
        scratch = Scratch(given.spec)
        made = self.make(f"{given.stage}: {given.name}", step, scratch)
        self.known.learn(given, made.ref)
        return Feed(scratch, made.ref)

    def _learned(self, given: Input, feed: Feed) -> TensorRef:
        ref = feed.ref()
        if isinstance(given, SourceTensor):  # what was made of other bytes must not be recorded
            self.known.check_unchanged(self.known.entry(given).file)
        if self.known.ref(given) is None:
            self.known.learn(given, ref)
        return ref


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
            facts.setdefault(entry.file, {})[memo_name(entry)] = ref.digest
    for path, found in facts.items():
        known.check_unchanged(path)
        store.remember(known.file_id(path).key(), found)
