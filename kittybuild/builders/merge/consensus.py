"""How the weighted differences of several models become one: their sum, or that of those that agree on its sign."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import Job
from kittybuild.builders.merge.common import divide, rounded_weights, rounding
from kittybuild.builders.threshold import as_bits

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
    """The sign of the sum for each element, as its sign bit alone, in integers; NaN elects minus."""
    import numpy as np

    first, *others = parts
    votes = first + others[0] if others else first.copy()
    for part in others[1:]:
        votes += part
    lost = np.isnan(votes)  # their sign bits differ from one CPU to another
    if lost.any():
        votes[lost] = -1
    signs = as_bits(votes)
    signs &= np.iinfo(signs.dtype).min
    return signs


def agreeing(parts: Iterable[Array], weights: Sequence[float], signs: Array, *, normalize: bool) -> Array:
    """The sum of those parts that have these signs, over the sum of their weights with `normalize`; overwrites the
    parts.

    Where minus is elected, all are negated (by the sign bit): those that agree are then the positive ones, the others
    count as zero. Only parts that are all -0 elect minus without one that agrees, and their sum is then -0 as well.
    """
    import numpy as np

    mixed, agree = None, []
    for part in parts:
        _negate(part, signs)
        np.maximum(part, 0, out=part)  # NaN stays
        if normalize:
            agree.append(part > 0)
        mixed = _plus(mixed, part)
    assert mixed is not None  # there is a model
    if normalize:
        mixed /= _without_zeros(_weighed(agree, weights, mixed.dtype.type), min(weights))
    _negate(mixed, signs)
    return mixed


def _weighed(agree: Sequence[Array], weights: Sequence[float], dtype: type[Any]) -> Array:
    """For each element the sum of the weights of those that agree, in order.

    Equal weights whose sums are their multiples, as those of few models are, are multiplied with a count: a count of
    bytes costs next to nothing.
    """
    import numpy as np

    weight = dtype(weights[0])
    sums = list(itertools.accumulate(map(dtype, weights)))
    if len(weights) < 256 and sums == [dtype(count) * weight for count in range(1, len(weights) + 1)]:
        count = agree[0].view(np.uint8)
        for one in agree[1:]:
            count += one.view(np.uint8)
        return np.asarray(np.multiply(count, weight, dtype=dtype))
    total: Array = np.multiply(agree[0], weight, dtype=dtype)
    for one, weight in zip(agree[1:], weights[1:], strict=True):
        total += np.multiply(one, weight, dtype=dtype)
    return total


def _without_zeros(sums: Array, least: float) -> Array:
    """Sums of weights in place, with 1 or `least`, the least of the weights, for zero.

    (A sum of positive weights that is zero divides zero, so that any number will do; then a maximum is cheaper.)
    """
    import numpy as np

    if least > 0:
        return np.maximum(sums, least, out=sums)
    sums += sums == 0
    return sums


def _negate(part: Array, signs: Array) -> None:
    """The part in place, negated where a sign bit is set."""
    bits = as_bits(part)
    bits ^= signs


def _plus(total: Array | None, part: Array) -> Array:
    """The sum in place of the total; of the part, where it is the first."""
    if total is None:
        return part
    total += part
    return total
