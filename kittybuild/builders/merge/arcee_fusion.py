"""Arcee Fusion: only those changes are taken over that are important, by their size and by what their row became."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.elementary import exponential, logarithm
from kittybuild.builders.merge.common import rounding
from kittybuild.builders.numerics import tree_sums
from kittybuild.builders.selection import largest
from kittybuild.model.method import Method

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

Importance = Callable[["Array", int], "Array"]
"""The importance of differences; the number is the index of the first."""

SMOOTHING = 1e-8
QUARTILES = 0.25, 0.5, 0.75
IN_CACHE = 32_768
"""Elements whose divergence is computed together."""
FEW = 4
"""So many elements are too few for the first quartile to be above the least."""


def _arcee_fusion(job: Job) -> Combine:
    """base + δ where |δ| · D is at least its median + 1.5 · (upper - lower quartile), else base; δ = other - base.

    D is, for each row (of the last dimension; other tensors are one row), the divergence Σ p log(p / q) of the softmax
    p of other from the softmax q of base, each with 1e-8 added. The quartile at a share s of n elements is the one
    with the index int(s (n - 1)) in order. D is of float64, within some units of its last place, and rounded once; all
    else is single steps in the working dtype. (Arcee 2025; mergekit 0.1.5, whose quartiles of more than a million
    elements are those of a sample.)
    """
    import numpy as np

    shape = job.output.shape
    important = _importance(job, shape[-1] if shape else 1)
    round_to = rounding(job)
    lower, median, upper = _quartiles(job, important)
    least = round_to(median + round_to(1.5 * round_to(upper - lower)))

    def combine(block: Block) -> Array:
        base, other = block.inputs
        other -= base
        taken = important(other, block.start)
        other *= np.greater_equal(taken, least, out=taken)  # what is not finite becomes NaN here, and is reported
        return np.add(base, other, out=base)

    return combine


def _importance(job: Job, width: int) -> Importance:
    """One pass for the divergences of all rows, which it holds."""
    import numpy as np

    divergences = np.empty(math.prod(job.output.shape[:-1]), np.float64 if job.double else np.float32)
    for block in job.scan():
        first = block.start // width
        base, other = block.inputs
        divergences[first : first + block.count // width] = _divergences(base, other, width)

    def important(delta: Array, start: int) -> Array:
        count = len(delta)
        if start % width == count % width == 0:
            found = delta.reshape(-1, width) * divergences[start // width : (start + count) // width, None]
        else:
            found = delta * divergences[np.arange(start, start + count) // width]
        return np.abs(found, out=found).reshape(-1)  # as the last step: the NaN that arises may have a sign

    return important


def _divergences(base: Array, other: Array, width: int) -> Array:
    """Of each row, in float64. (It is never negative, but its rounding may be.)"""
    import numpy as np

    found: list[float] = []
    several = max(1, IN_CACHE // width) * width
    for start in range(0, len(base), several):
        p, q = (_softmax(array[start : start + several].reshape(-1, width)) for array in (other, base))
        terms = logarithm(np.divide(p, q, out=q))
        terms *= p
        found += tree_sums(terms)
        del p, q, terms  # before there are others
    return np.maximum(found, 0.0)


def _softmax(rows: Array) -> Array:
    """Of each row, in float64, plus 1e-8."""
    import numpy as np

    powers = rows.astype(np.float64)
    powers -= powers.max(axis=1, keepdims=True)
    exponential(powers)
    powers /= np.reshape(tree_sums(powers.copy()), (-1, 1))
    powers += SMOOTHING
    return powers


def _quartiles(job: Job, important: Importance) -> list[float]:
    """The quartiles of the importance of all elements, exactly."""
    import numpy as np

    def scan(which: Collection[int]) -> Iterator[tuple[int, dict[int, Array]]]:
        for block in job.scan():
            base, other = block.inputs
            yield block.start, {0: important(np.subtract(other, base, out=other), block.start)}

    def part(which: Collection[int], start: int, count: int) -> dict[int, Array]:
        base, other = job.part(start, count).inputs
        return {0: important(np.subtract(other, base, out=other), start)}

    numel = job.output.numel
    places = [int(share * (numel - 1)) for share in QUARTILES]
    if numel <= FEW:
        values = [found[0] for _, found in scan([0])]
        return np.sort(np.concatenate(values))[places].tolist() if values else [0.0, 0.0, 0.0]
    counts = [numel - place for place in places]  # the quartile is the least of so many largest
    found = largest(scan, numel, counts, of=[0, 0, 0], part=part, double=job.double)
    bits = np.array([threshold.bits for threshold in found], np.int64 if job.double else np.int32)
    return [float(value) for value in bits.view(np.float64 if job.double else np.float32)]


ARCEE_FUSION = Builder(
    "arcee_fusion",
    1,
    _arcee_fusion,
    scratch=16,
    measured=True,
    rows=True,
    method=Method(
        name="arcee_fusion",
        title="Arcee Fusion",
        paper="https://arcee.ai",
        base="required",
        most=1,
        params=(),
        doc="Takes over the changes of the other model that are important: large, and in rows whose distribution they"
        " changed.",
    ),
)
