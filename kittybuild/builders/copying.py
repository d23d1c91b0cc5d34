"""Builders that do no arithmetic: a change of dtype, and the copy of inputs that must be equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.errors import BuildError

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def _cast(job: Job) -> Combine:
    """The input in another dtype: one rounding to nearest, ties to even."""
    return lambda block: block.inputs[0]


def _same(job: Job) -> Combine:
    """The first input, which all others must equal bit for bit (integer buffers are never averaged)."""
    import numpy as np

    def combine(block: Block) -> Array:
        first, *others = block.inputs
        for index, other in enumerate(others, start=2):
            if not np.array_equal(first.view(np.uint8), other.view(np.uint8)):
                raise BuildError(
                    "KB503",
                    f"integer inputs differ: input {index} is not the same as input 1",
                    hint="integer buffers cannot be merged; make them equal in the sources",
                )
        return first

    return combine


CAST = Builder("cast", 1, _cast, scratch=0)
SAME = Builder("same", 1, _same, scratch=1)
