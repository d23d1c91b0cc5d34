"""Bytes to tensors and back, block by block, with the digests taken on the way while the bytes are in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from blake3 import blake3
from xxhash import xxh3_64

from kittybuild.builders.base import Block, Combine
from kittybuild.builders.numerics import one_nan, rounded
from kittybuild.checkpoint.reading import Reader
from kittybuild.digest import Digest
from kittybuild.errors import SourceError
from kittybuild.model.derivation import Derivation
from kittybuild.store.problems import DamagedTensor
from kittybuild.tensors import DType, TensorRef, TensorSpec


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's name for a dtype."""
    return getattr(torch, dtype.torch_name)  # type: ignore[no-any-return]


def nonfinite(tensor: torch.Tensor) -> int:
    """How many elements are NaN or infinite; asks the extremes first, which costs a tenth of asking each element."""
    if tensor.element_size() == 1:  # the float8 types have no extremes in torch
        tensor = tensor.float()
    low, high = tensor.aminmax()
    if math.isfinite(low) and math.isfinite(high):
        return 0
    return int(tensor.isfinite().logical_not_().sum())


class Sink(Protocol):
    """Takes the bytes of one tensor."""

    def write(self, offset: int, data: memoryview) -> None:
        """The bytes from `offset` of the tensor on."""


class Feed:
    """One input: its bytes, and what is to be found out or checked while they pass.

    `ref` None: the content is unknown and digested in the first full pass. `xxh3`: what the bytes must give; `path` is
    of the store's file that they come from, which is checked even where no XXH3 is known.
    """

    def __init__(self, reader: Reader, ref: TensorRef | None, xxh3: str | None = None, path: str = "") -> None:
        self.reader, self.spec, self.path = reader, reader.spec, path
        self._ref, self._xxh3 = ref, xxh3
        self._digest = blake3() if ref is None or (path and xxh3 is None) else None
        self._check = xxh3_64() if xxh3 is not None else None

    def read(self, start: int, buffer: memoryview, *, last: bool) -> None:
        """Fill `buffer` from byte `start` on; `last`: this is the pass in which digests are taken."""
        try:
            self.reader.read_into(start, buffer)
        except SourceError as error:
            if not self.path:
                raise
            raise DamagedTensor(self.path, error.message) from error
        if last and self._digest is not None:
            self._digest.update(buffer)
        if last and self._check is not None:
            self._check.update(buffer)

    def ref(self) -> TensorRef:
        """The content, after a full pass. Raises DamagedTensor where the bytes are not what the store says."""
        found = self._ref
        if self._digest is not None:
            found, self._digest = TensorRef(Digest(self._digest.hexdigest()), self.spec), None
        other = self._check is not None and self._check.hexdigest() != self._xxh3
        if other or (self._ref is not None and self._ref != found):
            raise DamagedTensor(self.path, f"a tensor of {self.spec} has other bytes than when it was written")
        assert found is not None
        self._ref = found
        return found


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
        finished = rounded(result, self._dtype)
        if self.spec.dtype.is_float and (count := nonfinite(finished)):
            self.nonfinite += count
            finished = one_nan(finished)
        self.put_bytes(memoryview(finished.contiguous().view(torch.uint8).numpy().data))

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
            count = min(self.elements, numel - start)
            yield Block(start, tuple(self._input(i, start, count, last=last) for i in range(self.streamed)))

    def _input(self, index: int, start: int, count: int, *, last: bool) -> torch.Tensor:
        feed, size = self.feeds[index], self.feeds[index].spec.dtype.size
        stored = self._stored[index]
        feed.read(start * size, memoryview(stored)[: count * size], last=last)
        raw = torch.frombuffer(stored, dtype=torch_dtype(feed.spec.dtype), count=count)
        return raw if raw.dtype is self._working[index] else self._wide[index][:count].copy_(raw)
