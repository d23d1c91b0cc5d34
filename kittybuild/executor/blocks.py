"""Bytes to arrays and back, block by block; the result is digested on the way while its bytes are in cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from xxhash import xxh3_64

from kittybuild.builders.base import Block, Builder, Combine
from kittybuild.builders.floats import largest, numpy_dtype, one_nan, rounded
from kittybuild.digest import Digest
from kittybuild.executor.feed import Feed, Sink
from kittybuild.executor.finite import nonfinite
from kittybuild.model.derivation import Derivation
from kittybuild.tensors import DType, TensorRef, TensorSpec

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


class Output:
    """The tensor being made: rounded to its dtype, digested and handed to the sink."""

    def __init__(self, spec: TensorSpec, sink: Sink) -> None:
        self.spec, self.sink = spec, sink
        self.nonfinite = 0
        self._limit = largest(spec.dtype) if spec.dtype.is_float else 0.0
        self._digest, self._xxh3 = blake3(), xxh3_64()
        self._offset = 0

    def put(self, result: Array) -> None:
        """The next block of the result, in the working dtype or the output's."""
        finished = np.ascontiguousarray(rounded(result, self.spec.dtype))
        data = _bytes(finished)
        if not self._surely_finite(result) and (count := nonfinite(data, self.spec.dtype)):
            self.nonfinite += count
            data = _bytes(one_nan(finished, self.spec.dtype))
        self.put_bytes(data)

    def _surely_finite(self, result: Array) -> bool:
        """Whether even the extremes fit the dtype: that costs a fraction of asking each element."""
        if not result.size or not self.spec.dtype.is_float:
            return True
        return bool(-self._limit <= result.min() and result.max() <= self._limit)

    def put_bytes(self, data: memoryview) -> None:
        """The next bytes of the result, as they are."""
        self._digest.update(data)
        self._xxh3.update(data)
        self.sink.write(self._offset, data)
        self._offset += len(data)

    def result(self) -> tuple[TensorRef, str]:
        """Content and XXH3-64 of all that was put."""
        return TensorRef(Digest(self._digest.hexdigest()), self.spec), self._xxh3.hexdigest()


def _bytes(array: Array) -> memoryview:
    return memoryview(array.view(np.uint8).data)


@dataclass
class StreamJob:
    """A derivation's inputs as its builder sees them (builders.base.Job)."""

    drv: Derivation
    feeds: tuple[Feed, ...]
    streamed: int
    elements: int

    def __post_init__(self) -> None:
        inputs = [feed.spec.dtype for feed in self.feeds]
        self._double = DType.F64 in inputs
        wide = np.dtype(np.float64 if self._double else np.float32)
        self._types = [numpy_dtype(dtype) for dtype in inputs]
        self._working = [wide if dtype.is_float else kept for dtype, kept in zip(inputs, self._types, strict=True)]
        size = min(self.elements, self.drv.output.numel)
        self._stored = [bytearray(size * dtype.size) for dtype in inputs[: self.streamed]]
        self._wide = [np.empty(size, dtype) for dtype in self._working[: self.streamed]]

    @property
    def params(self) -> Mapping[str, Any]:
        """See Job."""
        return self.drv.params

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """See Job."""
        return tuple(given.spec for given in self.drv.inputs)

    @property
    def output(self) -> TensorSpec:
        """See Job."""
        return self.drv.output

    @property
    def double(self) -> bool:
        """See Job."""
        return self._double

    def scan(self) -> Iterator[Block]:
        """See Job."""
        return self._blocks(last=False)

    def part(self, start: int, count: int) -> Block:
        """See Job."""
        return self._block(start, count, last=False)

    def whole(self, index: int) -> Array:
        """See Job."""
        return np.frombuffer(self.stored(index), self._types[index]).reshape(self.feeds[index].spec.shape)

    def stored(self, index: int) -> bytearray:
        """See Job."""
        data = bytearray(self.feeds[index].spec.nbytes)
        self.feeds[index].read(0, memoryview(data), last=True)
        return data

    def make(self, builder: Builder, output: Output) -> None:
        """Run a builder over the inputs into `output`. What floats may do, they do in silence: the output counts it."""
        with np.errstate(all="ignore"):
            combine: Combine = builder.prepare(self)
            for block in self._blocks(last=True):
                output.put(combine(block))

    def _blocks(self, *, last: bool) -> Iterator[Block]:
        numel = self.drv.output.numel
        for start in range(0, numel, self.elements):
            yield self._block(start, min(self.elements, numel - start), last=last)

    def _block(self, start: int, count: int, *, last: bool) -> Block:
        return Block(start, tuple(self._input(i, start, count, last=last) for i in range(self.streamed)), count)

    def _input(self, index: int, start: int, count: int, *, last: bool) -> Array:
        feed, size = self.feeds[index], self._types[index].itemsize
        stored = self._stored[index]
        feed.read(start * size, memoryview(stored)[: count * size], last=last)
        raw = np.frombuffer(stored, self._types[index], count)
        if raw.dtype == self._working[index]:
            return raw
        wide = self._wide[index][:count]
        wide[...] = raw
        return wide
