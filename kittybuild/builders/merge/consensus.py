"""How the weighted differences of several models become one: their sum, or that of those that agree on its sign."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kittybuild.builders.base import Job
from kittybuild.builders.merge.common import divide, rounded_weights, rounding
from kittybuild.builders.threshold import masked

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

Parts = Callable[[], Iterable["Array"]]
"""Gives the weighted differences of a block, again and again; each may be overwritten after the last time."""
Mix = Callable[[Parts], "Array"]
Consensus = Callable[[Job], Mix]

ZERO = 1e-8


def summed(job: Job) -> Mix:
    """The sum; with `normalize` over the sum of the weights, which below 1e-8 counts as 1 (mergekit 0.1.5)."""
    round_to, total = rounding(job), 0.0
    for weight in rounded_weights(job):
        total = round_to(total + weight)
    divisor = total if job.params["normalize"] and abs(total) >= ZERO else 1.0

    def mix(parts: Parts) -> Array:
        mixed = None
        for part in parts():
            mixed = _plus(mixed, part)
        assert mixed is not None  # there is a model
        return divide(mixed, divisor)

    return mix


def elected(job: Job) -> Mix:
    """The sum of those that have the sign of the sum of all; with `normalize` over the sum of their weights, where 0
    counts as 1. A sum of zero elects plus; zeros agree with nobody (Yadav et al. 2023, mergekit 0.1.5).
    """
    weights, normalize = rounded_weights(job), job.params["normalize"]
    return lambda parts: agreeing(parts(), weights, election(parts()), normalize=normalize)


def election(parts: Iterable[Array]) -> Array:
    """The sign of the sum, 1 or -1, for each element."""
    import numpy as np

    sign: Array | None = None
    for part in parts:
        sign = part.copy() if sign is None else _plus(sign, part)
    assert sign is not None  # there is a model
    np.greater_equal(sign, 0, out=sign)
    sign *= 2
    sign -= 1
    return sign


def agreeing(parts: Iterable[Array], weights: Sequence[float], sign: Array, *, normalize: bool) -> Array:
    """The sum of those parts that have this sign, over the sum of their weights with `normalize`; overwrites the parts.

    Every part is multiplied by that sign (exactly): those that agree are then the positive ones.
    """
    import numpy as np

    mixed = divisor = None
    for part, weight in zip(parts, weights, strict=True):
        part *= sign
        if normalize:
            divisor = _plus(divisor, np.multiply(part > 0, weight, dtype=part.dtype))
        mixed = _plus(mixed, masked(part, ~(part < 0)))  # neither NaN nor the sign of a zero is lost
    assert mixed is not None  # there is a model
    if divisor is not None:
        divisor += divisor == 0
        mixed /= divisor
    mixed *= sign
    return mixed


def _plus(total: Array | None, part: Array) -> Array:
    """The sum in place of the total; of the part, where it is the first."""
    if total is None:
        return part
    total += part
    return total
