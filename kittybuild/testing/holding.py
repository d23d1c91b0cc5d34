"""What a builder holds beside its inputs, as Python and numpy count what they allocate."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kittybuild.builders.base import Block, Builder
from kittybuild.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def held_by_blocks(builder: Builder, inputs: Sequence[Array], params: Mapping[str, Any], elements: int) -> int:
    """The most bytes at once that `combine` takes on blocks of so many elements of float32 inputs of one shape."""
    job = _Prepared(inputs, params, elements)
    combine = builder.prepare(job)

    def work() -> None:
        for block in job.scan():
            combine(block)

    return most_held(work)


def most_held(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while `work` ran."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start(1)
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()


class _Prepared:
    """A job (builders.base.Job) whose blocks are allocated before anything is counted."""

    def __init__(self, inputs: Sequence[Array], params: Mapping[str, Any], elements: int) -> None:
        self.params, self.double, self.elements = params, False, elements
        self.output = TensorSpec(DType.F32, inputs[0].shape)
        self.inputs = (self.output,) * len(inputs)
        self._whole = list(inputs)
        self._flat = [array.reshape(-1) for array in inputs]
        self._buffers = [np.empty(elements, np.float32) for _ in inputs]

    def scan(self) -> Iterator[Block]:
        """See Job."""
        count = self.output.numel
        return (self.part(start, min(self.elements, count - start)) for start in range(0, count, self.elements))

    def part(self, start: int, count: int) -> Block:
        """See Job."""
        for buffer, flat in zip(self._buffers, self._flat, strict=True):
            buffer[:count] = flat[start : start + count]
        return Block(start, tuple(buffer[:count] for buffer in self._buffers), count)

    def whole(self, index: int) -> Array:
        """See Job."""
        return self._whole[index]

    def stored(self, index: int) -> bytearray:
        """See Job."""
        return bytearray(self._whole[index].tobytes())
