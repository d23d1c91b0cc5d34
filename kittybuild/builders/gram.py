"""A merge's inputs as vectors: the dot products of every two from one pass, a sum of multiples of them from another.

Whatever is such a sum needs no tensor of its own: its length and its angles follow from the Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import Block, Combine, Job
from kittybuild.builders.merge.common import rounding
from kittybuild.builders.numerics import dots, reals, row_dots

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

Pairs = tuple[tuple[int, int], ...]
Formula = Callable[[Any, Sequence[Sequence[Any]]], Sequence[Any]]
"""Takes an mpmath context and a Gram matrix of its numbers, and gives a multiple for each vector."""


def pairs_of(count: int) -> Pairs:
    """Every two of so many vectors, each with itself too: (0, 0), (0, 1), ..., (1, 1), ..."""
    return tuple((i, j) for i in range(count) for j in range(i, count))


def vectors(block: Block, *, based: bool) -> list[Array]:
    """The inputs; where they are `based`, the differences of the others from the first instead, in their place."""
    import numpy as np

    if not based:
        return list(block.inputs)
    base, *others = block.inputs
    return [np.subtract(other, base, out=other) for other in others]


def gram(job: Job, *, based: bool, width: int | None = None) -> list[list[float]]:
    """The dot products of every two vectors, summed in float64: by leaf, or by rows of `width`, as trees.

    Products of float32 are exact, those of float64 rounded once. Of empty tensors there are none.
    """
    pairs: Pairs = ()
    sums: list[float] = []
    for block in job.scan():
        given = vectors(block, based=based)
        pairs = pairs or pairs_of(len(given))
        sums = sums or [0.0] * len(pairs)
        for part in dots(given, pairs) if width is None else row_dots(given, pairs, width).T.tolist():
            sums = [total + product for total, product in zip(sums, part, strict=True)]
    found = dict(zip(pairs, sums, strict=True))
    count = math.isqrt(2 * len(pairs))
    return [[found[min(i, j), max(i, j)] for j in range(count)] for i in range(count)]


def multiples(job: Job, formula: Formula, *, based: bool) -> list[float]:
    """What `formula` makes of the vectors' Gram matrix, in 120 bits, rounded to float64; NaN if that is not finite."""
    found = gram(job, based=based)
    if not found or not all(math.isfinite(product) for row in found for product in row):
        return [math.nan] * len(found)
    with reals() as real:
        return [float(each) for each in formula(real, [[real.mpf(product) for product in row] for row in found])]


def summed_multiples(job: Job, factors: Sequence[float], *, based: bool) -> Combine:
    """Σ f_i v_i, to the base where the vectors are `based` on it: each factor, product and sum rounded once."""
    import numpy as np

    round_to = rounding(job)
    factors = [round_to(factor) for factor in factors]

    def combine(block: Block) -> Array:
        total = None
        for factor, vector in zip(factors, vectors(block, based=based), strict=True):
            vector *= factor
            if total is None:
                total = vector
            else:
                total += vector
        if total is None:
            return block.inputs[0]
        return np.add(block.inputs[0], total, out=block.inputs[0]) if based else total

    return combine
