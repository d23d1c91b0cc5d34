"""Builders over whole tensors: inputs cut and cast as the peer does, merged in one go, handed out block by block."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import Builder, Combine, Job
from kittybuild.builders.floats import numpy_dtype
from kittybuild.errors import BuildError
from kittybuild.model.method import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Given:
    """What a merge works on: the base, where the method has one, the other models in order, and the job's parameters.

    The tensors have the output's shape, and the models' element types but for a cast to the recipe's `dtype`.
    """

    base: Tensor | None
    models: tuple[Tensor, ...]
    params: Mapping[str, Any]

    @property
    def origin(self) -> Tensor:
        """The base of a method that needs one."""
        assert self.base is not None
        return self.base


def refused(method: str, why: str) -> BuildError:
    """The error where the peer itself ends with one: it has no bits to reproduce."""
    hint = "leave `numerics` out: kitty-1 has an answer here"
    return BuildError("KB510", f"{method}: {why}, where the program whose numerics these are fails", hint=hint)


def in_order(numbers: Iterable[float]) -> float:
    """The sum, each step rounded, as Python's `sum` gives it before Python 3.12 (and the peers there)."""
    return functools.reduce(operator.add, numbers, 0.0)


Merge = Callable[[Given], "Tensor"]


def peer(numerics: str, method: Method, merge: Merge, *, promoted: bool = False) -> Builder:
    """A builder of the class `numerics`. `promoted`: the inputs are first brought to their common element type."""
    prepare = whole_tensor(merge, method, promoted=promoted)
    return Builder(
        method.name, 1, prepare, streamed=0, scratch=0, seeded=method.random, numerics=numerics, method=method
    )


def whole_tensor(merge: Merge, method: Method, *, promoted: bool) -> Callable[[Job], Combine]:
    """`merge` as a builder's `prepare`. The result is cast to the output's element type as torch casts.

    Larger inputs are cut to the output's shape, from the first row and column on.
    """

    def prepare(job: Job) -> Combine:
        import numpy as np
        import torch

        if job.output.numel == 0:
            return lambda block: np.empty(0, np.float32)
        corner = tuple(slice(side) for side in job.output.shape)
        tensors = [_tensor(job, index)[corner] for index in range(len(job.inputs))]
        if name := job.params.get("dtype"):
            tensors = [tensor.to(getattr(torch, name)) for tensor in tensors]
        elif promoted:
            common = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
            tensors = [tensor.to(common) for tensor in tensors]
        based = job.params["base"] if method.base == "optional" else method.base == "required"
        given = Given(tensors[0] if based else None, tuple(tensors[based:]), job.params)
        del tensors
        merged = merge(given).to(getattr(torch, job.output.dtype.torch_name)).reshape(-1)
        result = merged.view(torch.uint8).numpy().view(numpy_dtype(job.output.dtype))
        return lambda block: result[block.start : block.start + block.count]

    return prepare


def _tensor(job: Job, index: int) -> Tensor:
    """An input as torch holds it."""
    import torch

    spec = job.inputs[index]
    dtype = getattr(torch, spec.dtype.torch_name)
    if not spec.numel:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(job.stored(index), dtype=dtype).reshape(spec.shape)
