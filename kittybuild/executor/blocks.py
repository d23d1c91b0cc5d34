"""Bytes to tensors and back, block by block; the result is digested on the way while its bytes are in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3
from xxhash import xxh3_64

from kittybuild.builders.base import Block, Combine
from kittybuild.builders.numerics import one_nan, rounded
from kittybuild.digest import Digest
from kittybuild.executor.feed import Feed, Sink
from kittybuild.executor.finite import nonfinite
from kittybuild.model.derivation import Derivation
from kittybuild.tensors import DType, TensorRef, TensorSpec


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's name for a dtype."""
    return getattr(torch, dtype.torch_name)  # type: ignore[no-any-return]


def _surely_finite(tensor: torch.Tensor) -> bool:
    """Whether the sum is finite: then all elements are (else they may be). Costs a fortieth of asking each."""
    if tensor.element_size() == 1:  # torch adds no float8 types
        tensor = tensor.float()
    return math.isfinite(tensor.sum())


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().data)


class Output:
    """The tensor being made: rounded to its dtype, digested and handed to the sink."""

    def __init__(self, spec: TensorSpec, sink: Sink) -> None:
        self.spec, self.sink = spec, sink
        self.nonfinite = 0
        self._dtype = torch_dtype(spec.dtype)
        self._digest, self._xxh3 = blake3(), xxh3_64()
        self._offset = 0

    def put(self, result: torch.Tensor) -> None:
        """The next block of the result."""
        finished = rounded(result, self._dtype).contiguous()
        data = _bytes(finished)
        if self.spec.dtype.is_float and not _surely_finite(finished) and (count := nonfinite(data, self.spec.dtype)):
            self.nonfinite += count
            data = _bytes(one_nan(finished))
        self.put_bytes(data)

    def put_bytes(self, data: memoryview) -> None:
        """The next bytes of the result, as they are."""
        self._digest.update(data)
        self._xxh3.update(data)
        self.sink.write(self._offset, data)
        self._offset += len(data)

    def result(self) -> tuple[TensorRef, str]:
        """Content and XXH3-64 of all that was put."""
        return TensorRef(Digest(self._digest.hexdigest()), self.spec), self._xxh3.hexdigest()


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
        wide = torch.float64 if self._double else torch.float32
        self._working = [wide if dtype.is_float else torch_dtype(dtype) for dtype in inputs[: self.streamed]]
        size = min(self.elements, self.drv.output.numel)
        self._stored = [bytearray(size * dtype.size) for dtype in inputs[: self.streamed]]
        self._wide = [torch.empty(size, dtype=dtype) for dtype in self._working]

    @property
    def params(self) -> Mapping[str, Any]:
        """See Job."""
        return self.drv.params

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

    def whole(self, index: int) -> torch.Tensor:
        """See Job."""
        feed = self.feeds[index]
        stored = bytearray(feed.spec.nbytes)
        feed.read(0, memoryview(stored), last=True)
        return torch.frombuffer(stored, dtype=torch_dtype(feed.spec.dtype)).reshape(feed.spec.shape)

    def run(self, combine: Combine, output: Output) -> None:
        """The last pass: every block through `combine` into `output`."""
        for block in self._blocks(last=True):
            output.put(combine(block))

    def _blocks(self, *, last: bool) -> Iterator[Block]:
        numel = self.drv.output.numel
        for start in range(0, numel, self.elements):
            yield self._block(start, min(self.elements, numel - start), last=last)

    def _block(self, start: int, count: int, *, last: bool) -> Block:
        return Block(start, tuple(self._input(i, start, count, last=last) for i in range(self.streamed)), count)

    def _input(self, index: int, start: int, count: int, *, last: bool) -> torch.Tensor:
        feed, size = self.feeds[index], self.feeds[index].spec.dtype.size
        stored = self._stored[index]
        feed.read(start * size, memoryview(stored)[: count * size], last=last)
        raw = torch.frombuffer(stored, dtype=torch_dtype(feed.spec.dtype), count=count)
        return raw if raw.dtype is self._working[index] else self._wide[index][:count].copy_(raw)
