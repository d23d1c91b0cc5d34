"""Builders that do no arithmetic: a change of dtype, the copy of equal inputs, zeros, joining and cutting."""

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


def _zeros(job: Job) -> Combine:
    """Zeros. No inputs, no params."""
    import numpy as np

    return lambda block: np.zeros(block.count, np.float32)


def _join(job: Job) -> Combine:
    """The elements of all inputs, one after the other."""
    import numpy as np

    parts = [job.whole(index).reshape(-1) for index in range(len(job.inputs))]
    starts = np.cumsum([0, *(part.size for part in parts)])

    def combine(block: Block) -> Array:
        end = block.start + block.count
        first, last = np.searchsorted(starts, [block.start + 1, end]) - 1
        pieces = [parts[i][max(block.start - starts[i], 0) : end - starts[i]] for i in range(first, last + 1)]
        return np.concatenate(pieces)

    return combine


def _cut(job: Job) -> Combine:
    """The elements of the input from `start` on."""
    start, whole = job.params["start"], job.whole(0).reshape(-1)
    return lambda block: whole[start + block.start : start + block.start + block.count]


CAST = Builder("cast", 1, _cast, scratch=0)
SAME = Builder("same", 1, _same, scratch=1)
ZEROS = Builder("zeros", 1, _zeros, streamed=0, scratch=0)
JOIN = Builder("join", 1, _join, streamed=0, scratch=1, whole=0)
CUT = Builder("cut", 1, _cut, streamed=0, scratch=0, whole=0)
