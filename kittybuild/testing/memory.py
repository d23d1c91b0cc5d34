"""A builder run over arrays in memory, by the executor's own blocks: without a plan and without a store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kittybuild.builders.base import BLOCK, Builder
from kittybuild.builders.floats import numpy_dtype
from kittybuild.executor.blocks import Output, StreamJob
from kittybuild.executor.budget import streamed
from kittybuild.executor.carry_out import Scratch
from kittybuild.executor.feed import Feed
from kittybuild.model.derivation import Derivation, SourceTensor
from kittybuild.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def run(
    builder: Builder,
    inputs: Sequence[Array],
    params: Mapping[str, Any],
    *,
    dtype: DType | None = None,
    blocks: int = 4,
) -> Array:
    """What `builder` makes of these inputs, which have one shape; `dtype`: of the result, else the first input's.

    `blocks`: how many leaves of BLOCK elements (or rows, for a builder of rows) go into a block.
    """
    specs = [spec_of(array) for array in inputs]
    given = tuple(SourceTensor("memory", str(number), spec) for number, spec in enumerate(specs))
    output = specs[0].with_dtype(dtype) if dtype else specs[0]
    drv = Derivation(builder.name, builder.version, dict(params), given, output, builder.numerics)
    feeds = tuple(Feed(_stored(array), None) for array in inputs)
    least = max(1, math.prod(output.shape[-1:])) if builder.rows else BLOCK
    made = Scratch(output)
    StreamJob(drv, feeds, streamed(builder, drv), blocks * least).make(builder, Output(output, made))
    data = bytearray(output.nbytes)
    made.read_into(0, memoryview(data))
    return np.frombuffer(data, numpy_dtype(output.dtype)).reshape(output.shape)


def drawn(seed: str, *shape: int, dtype: DType = DType.F32) -> Array:
    """Values between -1 and 1, denser near zero, which only the seed decides, on every machine and for ever."""
    stream = hashlib.shake_256(seed.encode()).digest(8 * math.prod(shape))
    even = np.frombuffer(stream, dtype="<i8").astype(np.float64) / 2.0**63
    return (even * even * even).astype(numpy_dtype(dtype)).reshape(shape)


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays are equal in every bit."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def spec_of(array: Array) -> TensorSpec:
    """The dtype and shape of an array, as a checkpoint names them."""
    dtype = next(dtype for dtype in DType if numpy_dtype(dtype) == array.dtype)
    return TensorSpec(dtype, array.shape)


def _stored(array: Array) -> Scratch:
    held = Scratch(spec_of(array))
    held.write(0, memoryview(array.tobytes()))
    return held
