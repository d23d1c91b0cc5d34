"""Builders over tensors in memory: the executor's own blocks and buffers, without a plan and without a store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kittybuild.builders import floats
from kittybuild.builders.base import BLOCK, Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.digest import Digest
from kittybuild.executor.blocks import Output, StreamJob
from kittybuild.executor.budget import streamed
from kittybuild.executor.feed import Feed
from kittybuild.model.derivation import KITTY_1, Derivation, SourceTensor
from kittybuild.tensors import DType, TensorRef, TensorSpec


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's name for a dtype."""
    found = getattr(torch, dtype.torch_name)
    assert isinstance(found, torch.dtype)
    return found


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
    shape: Sequence[int] | None = None,
    blocks: int = 4,
    builders: Builders = BUILTIN,
    numerics: str = KITTY_1,
) -> Made:
    """Run a builder as the executor does. `dtype`, `shape`: of the output, else the first input's; `blocks`: leaves (or
    rows) a block.
    """
    output = TensorSpec(dtype_of(dtype or inputs[0].dtype), tuple(inputs[0].shape if shape is None else shape))
    given = tuple(SourceTensor("memory", str(index), spec_of(tensor)) for index, tensor in enumerate(inputs))
    known = builders.get(builder, numerics)
    assert known is not None, (builder, numerics)
    drv = Derivation(builder, known.version, dict(params or {}), given, output, numerics)
    return realised(drv, inputs, blocks=blocks, builders=builders)


def realised(drv: Derivation, inputs: Sequence[Tensor], *, blocks: int = 4, builders: Builders = BUILTIN) -> Made:
    """What a derivation makes of these inputs."""
    feeds = [Memory.of(tensor) for tensor in inputs]
    known, output = builders.behind(drv), drv.output
    refs = [Feed(feed, TensorRef(Digest.of(feed.data), feed.spec)) for feed in feeds]
    row = math.prod(output.shape[-1:])
    job = StreamJob(drv, tuple(refs), streamed(known, drv), blocks * (max(1, row) if known.rows else BLOCK))
    sink = Memory(output, bytearray(output.nbytes))
    out = Output(output, sink)
    job.make(known, out)
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


def rounded(result: Tensor, dtype: torch.dtype) -> Tensor:
    """Working values rounded once to a dtype, as outputs are."""
    array = floats.rounded(result.contiguous().numpy(), dtype_of(dtype))
    return torch.from_numpy(array.view(f"i{array.itemsize}")).view(dtype)
