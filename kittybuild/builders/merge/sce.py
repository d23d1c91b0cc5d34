"""SCE: the elements in which fine-tunes differ most, weighted by their squares, where they agree on the sign."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.gram import vectors
from kittybuild.builders.merge.common import INT8_MASK, rounding
from kittybuild.builders.merge.consensus import agreeing, election
from kittybuild.builders.numerics import dots
from kittybuild.builders.selection import largest
from kittybuild.builders.threshold import EVERYTHING, Threshold, masked
from kittybuild.model.method import Method, Param

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def _sce(job: Job) -> Combine:
    """base + the weighted mean of those δ_i = x_i - base that have the sign of their sum (Wan et al. 2024, FuseChat).

    With `select_topk` below 1, first all but int(select_topk · n) elements of each δ_i are zeroed: those of the largest
    variance over the models, n being how many have one that is not zero; among equals the lowest index is kept. The
    weights are Σ δ_i² over all of them, or equal if all are zero. A sum of zero elects plus; zeros agree with nobody.
    Variances are of single steps in the working dtype, sums of squares float64 trees; weights are rounded once.

    (mergekit 0.1.5 weighs equally where the sum of the mean squares is below 1e-6, which it mostly is in fine-tunes,
    and divides by 1e-6 where the weights of those that agree are less.)
    """
    import numpy as np

    round_to = rounding(job)
    selected = _selection(job)
    weights = [round_to(weight) for weight in _weights(job, selected)]

    def combine(block: Block) -> Array:
        deltas = _deltas(block, selected)
        if not deltas:
            return block.inputs[0]
        sign = election(deltas)
        for delta, weight in zip(deltas, weights, strict=True):
            delta *= weight
        mixed = agreeing(deltas, weights, sign, normalize=True)
        return np.add(block.inputs[0], mixed, out=block.inputs[0])

    return combine


def _deltas(block: Block, selected: Threshold) -> list[Array]:
    """The differences from the base, in place, with zeros for what is not selected."""
    deltas = vectors(block, based=True)
    if deltas and selected != EVERYTHING:
        keep = selected.mask(_variance(deltas), block.start)
        for delta in deltas:
            masked(delta, keep)
    return deltas


def _variance(deltas: list[Array]) -> Array:
    """The variance of each element over the models (of a population). NaN has no sign, so that it stands above all."""
    import numpy as np

    mean = deltas[0].copy()
    for delta in deltas[1:]:
        mean += delta
    mean /= len(deltas)
    total: Array = np.zeros_like(mean)
    apart = np.empty_like(mean)
    for delta in deltas:
        np.subtract(delta, mean, out=apart)
        apart *= apart
        total += apart
    total /= len(deltas)
    return np.abs(total, out=total)


def _selection(job: Job) -> Threshold:
    """What `select_topk` keeps, as a threshold of the variance."""
    import numpy as np

    if job.params["select_topk"] >= 1:
        return EVERYTHING

    def variance(block: Block, which: Collection[int]) -> dict[int, Array]:
        found = _variance(vectors(block, based=True)) if len(block.inputs) > 1 else np.zeros_like(block.inputs[0])
        return dict.fromkeys(which, found)

    def scan(which: Collection[int]) -> Iterator[tuple[int, dict[int, Array]]]:
        return ((block.start, variance(block, which)) for block in job.scan())

    def part(which: Collection[int], start: int, count: int) -> dict[int, Array]:
        return variance(job.part(start, count), which)

    apart = 0
    for _, found in scan([0]):
        apart += int(np.count_nonzero(found[0] != 0))  # of booleans: those of floats are counted one by one
    count = int(apart * job.params["select_topk"])
    return largest(scan, job.output.numel, [count], part=part, double=job.double)[0]


def _weights(job: Job, selected: Threshold) -> list[float]:
    """The share of each model's squares in those of all; equal shares if there are none."""
    squares: list[float] = []
    for block in job.scan():
        deltas = _deltas(block, selected)
        squares = squares or [0.0] * len(deltas)
        for leaf in dots(deltas, [(i, i) for i in range(len(deltas))]) if deltas else ():
            squares = [square + part for square, part in zip(squares, leaf, strict=True)]
    total = 0.0
    for square in squares:
        total += square
    return [square / total if total else 1 / len(squares) for square in squares]


SCE = Builder(
    "sce",
    1,
    _sce,
    scratch=10,
    measured=True,
    method=Method(
        name="sce",
        title="SCE",
        paper="https://arxiv.org/abs/2408.07990",
        base="required",
        least=0,
        params=(
            Param(
                "select_topk",
                float,
                "shared",
                "the share of the elements in which the models differ that is kept, those in which they differ most",
                default=1.0,
                low=0.0,
            ),
            INT8_MASK,
        ),
        doc="Keeps the elements in which the models differ most, and adds to the base model the mean of the differences"
        " that have the elected sign, weighted by the models' squared differences.",
    ),
)
