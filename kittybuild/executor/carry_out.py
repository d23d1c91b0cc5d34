"""One order carried out: the inputs' bytes found, the builder run over them, the result written where it belongs.

An input that is nowhere is made in memory first, and so on down: nothing of it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.reading import Files, RawReader
from kittybuild.errors import BuildError, KittybuildError
from kittybuild.executor.blocks import Output, StreamJob
from kittybuild.executor.budget import block_elements, streamed
from kittybuild.executor.feed import Feed, Sink
from kittybuild.executor.order import Given, Order, Report, Slot
from kittybuild.store.disk import Disk
from kittybuild.store.problems import guarded
from kittybuild.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Tools:
    """What every order is carried out with. Safe to share between threads."""

    files: Files
    builders: Builders
    disk: Disk


class Scratch:
    """A tensor in memory: a sink while it is made, then a reader.

    It takes memory from the first write on: of a long chain of tensors only the last two are there at once.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self._bytes = bytearray()

    def write(self, offset: int, data: memoryview) -> None:
        """See Sink."""
        self._bytes = self._bytes or bytearray(self.spec.nbytes)
        self._bytes[offset : offset + len(data)] = data

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See Reader."""
        buffer[:] = memoryview(self._bytes)[start : start + len(buffer)]


class _Pen:
    """The place of one tensor in a file, as a sink."""

    def __init__(self, disk: Disk, fd: int, slot: Slot) -> None:
        self.disk, self.fd, self.slot = disk, fd, slot

    def write(self, offset: int, data: memoryview) -> None:
        """See Sink."""
        with guarded("write", self.slot.path, len(data)):
            self.disk.pwrite(self.fd, data, self.slot.offset + offset)


def carry_out(order: Order, tools: Tools) -> Report:
    """Do what the order says. Raises a KittybuildError: BuildError KB501 where the builder itself fails."""
    assert order.slot is not None  # only what is made first has none
    with _pen(order.slot, tools.disk) as pen:
        return _make(order, tools, pen)


@contextmanager
def _pen(slot: Slot, disk: Disk) -> Iterator[_Pen]:
    with guarded("write", slot.path):
        fd = disk.open_update(slot.path)
    try:
        yield _Pen(disk, fd, slot)
    finally:
        with guarded("close", slot.path):
            disk.close(fd)


def _make(order: Order, tools: Tools, sink: Sink) -> Report:
    drv, builder = order.drv, tools.builders.behind(order.drv)
    if ";" in drv.numerics:
        from kittybuild.executor.machine import check_machine

        check_machine(drv.numerics)
    fed = [_feed(given, tools) for given in order.inputs]
    feeds = tuple(feed for feed, _ in fed)
    job = StreamJob(drv, feeds, streamed(builder, drv), block_elements(builder, drv, order.share))
    output = Output(drv.output, sink)
    try:
        job.make(builder, output)
    except KittybuildError as error:
        error.at = error.at or order.name
        raise
    except (MemoryError, RuntimeError) as error:
        hint = "if memory ran out: fewer --jobs, a smaller --memory"
        raise BuildError("KB501", f"{drv.builder} failed: {error}", at=order.name, hint=hint) from error
    inputs = tuple(feed.ref() for feed in feeds)
    ref, xxh3 = output.result()
    return Report(ref, xxh3, output.nonfinite, inputs, tuple(report for _, report in fed))


def _feed(given: Given, tools: Tools) -> tuple[Feed, Report | None]:
    """An input's bytes, and what came of making it first."""
    if given.entry is not None:
        return Feed(tools.files.reader(given.entry), given.ref), None
    if given.location is not None:
        at = given.location
        return Feed(RawReader(tools.files, at.path, at.offset, given.spec), given.ref, at.xxh3, at.path), None
    assert given.first is not None  # an input has bytes somewhere
    scratch = Scratch(given.spec)
    made = _make(given.first, tools, scratch)
    return Feed(scratch, made.ref), made
