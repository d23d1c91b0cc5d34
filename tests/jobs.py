"""Builders over tensors in memory: the executor's own blocks and buffers, without a plan and without a store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kittybuild.builders.base import BLOCK, Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.digest import Digest
from kittybuild.executor.blocks import Feed, Output, StreamJob, torch_dtype
from kittybuild.executor.budget import streamed
from kittybuild.model.derivation import Derivation, SourceTensor
from kittybuild.tensors import DType, TensorRef, TensorSpec

torch.set_num_threads(1)  # as the executor does


def spec_of(tensor: Tensor) -> TensorSpec:
    """The spec of a tensor."""
    return TensorSpec(dtype_of(tensor.dtype), tuple(tensor.shape))


def dtype_of(dtype: torch.dtype) -> DType:
    """Our name for torch's dtype."""
    found = DType.named(str(dtype))
    assert found is not None, dtype
    return found


@dataclass
class Memory:
    """A tensor's bytes: a Reader that counts what it gives, and a Sink."""

    spec: TensorSpec
    data: bytearray
    given: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Memory:
        """The bytes of `tensor`."""
        flat = tensor.contiguous().reshape(-1)
        return cls(spec_of(tensor), bytearray(flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""))

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See Reader."""
        buffer[:] = memoryview(self.data)[start : start + len(buffer)]
        self.given += len(buffer)

    def write(self, offset: int, data: memoryview) -> None:
        """See Sink."""
        self.data[offset : offset + len(data)] = data

    def tensor(self) -> Tensor:
        """The tensor; it shares the bytes."""
        dtype = torch_dtype(self.spec.dtype)
        if not self.data:
            return torch.empty(self.spec.shape, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype).reshape(self.spec.shape)


@dataclass
class Made:
    """What a builder made: the tensor, its digest, how many elements are not finite, and the bytes of inputs read."""

    tensor: Tensor
    digest: Digest
    nonfinite: int
    read: list[int] = field(default_factory=list)


def make(
    builder: str,
    inputs: Sequence[Tensor],
    params: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    blocks: int = 4,
    builders: Builders = BUILTIN,
) -> Made:
    """Run a builder as the executor does. `dtype`: of the output, else the first input's; `blocks`: leaves a block."""
    feeds = [Memory.of(tensor) for tensor in inputs]
    output = TensorSpec(dtype_of(dtype or inputs[0].dtype), tuple(inputs[0].shape))
    given = tuple(SourceTensor("memory", str(index), feed.spec) for index, feed in enumerate(feeds))
    known = builders[builder]
    drv = Derivation(builder, known.version, dict(params or {}), given, output)
    refs = [Feed(feed, TensorRef(Digest.of(feed.data), feed.spec)) for feed in feeds]
    job = StreamJob(drv, tuple(refs), streamed(known, drv), blocks * BLOCK)
    sink = Memory(output, bytearray(output.nbytes))
    out = Output(output, sink)
    job.run(known.prepare(job), out)
    ref, _ = out.result()
    assert ref.spec == output
    return Made(sink.tensor(), ref.digest, out.nonfinite, [feed.given for feed in feeds])


def drawn(seed: str, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Values between -scale and scale, denser near zero, which only the seed decides, on every machine and for ever.

    (The streams of torch's and numpy's generators may change from release to release.)
    """
    import numpy as np

    stream = hashlib.shake_256(seed.encode()).digest(8 * math.prod(shape))
    even = np.frombuffer(stream, dtype="<i8").astype(np.float64) / 2.0**63
    return torch.from_numpy(even * even * even * scale).to(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor."""
    return bytes(Memory.of(tensor).data)


def halved(values: list[float]) -> float:
    """A tree sum by its definition: filled with zeros to a power of two, the halves are added, again and again."""
    values = values + [0.0] * ((1 << max(0, len(values) - 1).bit_length()) - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0] if values else 0.0
