"""Means of the directions of any number of models, as long as they are on average: Multi-SLERP, the Karcher mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kittybuild.builders.base import Builder, Combine, Job
from kittybuild.builders.gram import multiples, summed_multiples
from kittybuild.builders.merge.common import WEIGHT
from kittybuild.model.method import Method, Param

Real = Any
"""A number of 120 bits."""
Matrix = Sequence[Sequence[Real]]


def _multislerp(job: Job) -> Combine:
    """m / ‖m‖ · Σ w_i ‖x_i‖ for m = Σ w_i x_i / (‖x_i‖ + eps); Σ w_i x_i where ‖m‖ < eps; one model as it is.

    With a base: of the differences from it, added to it. The weights are divided by their sum with `normalize_weights`.
    (Goddard 2025, Multi-SLERP, and mergekit 0.1.5, which add a step along the weighted mean of the tangents at m / ‖m‖:
    it is Σ w_i u_i less its own part along m, so zero but for rounding. Where directions cancel they give up on more
    than two models, and so on every tensor in which no model differs from its base.)
    """
    weights, based = job.params["weight"], job.params["base"]
    if len(weights) == 1:
        return lambda block: block.inputs[-1]

    def formula(real: Any, gram: Matrix) -> list[Real]:
        shares = [real.mpf(weight) for weight in weights]
        if job.params["normalize_weights"]:
            total = sum(shares)
            shares = [share / total for share in shares]
        lengths = [real.sqrt(row[i]) for i, row in enumerate(gram)]
        eps = real.mpf(job.params["eps"])
        mean = [w / (n + eps) if n + eps else real.zero for w, n in zip(shares, lengths, strict=True)]
        length = _length(real, mean, gram)
        if length < eps or not length:
            return shares
        scale = sum(w * n for w, n in zip(shares, lengths, strict=True)) / length
        return [part * scale for part in mean]

    return summed_multiples(job, multiples(job, formula, based=based), based=based)


def _cancelled(params: Mapping[str, Any]) -> str | None:
    """The complaint where weights cannot be divided by their sum."""
    weights = params["weight"]
    if not params["normalize_weights"] or len(weights) == 1 or math.fsum(weights):
        return None
    return "the models' 'weight' adds up to 0, and 'normalize_weights' divides by that"


def _karcher(job: Job) -> Combine:
    """The direction to which the sum of the arcs to all models' directions is zero, times the mean of their lengths.

    From the mean direction (where that cancels to less than `tol`, the first model's), at most `max_iter` steps along
    the mean of the arcs' tangents, until one is shorter than `tol`. Models no longer than `tol` have no direction, but
    count in the mean length; if there are no others the result is zero. An arc within `tol` of none, or of half the
    circle, where no way is the shortest, adds nothing (mergekit 0.1.5, save the last; Karcher 1977).
    """
    max_iter, tol = job.params["max_iter"], job.params["tol"]

    def formula(real: Any, gram: Matrix) -> list[Real]:
        lengths = [real.sqrt(row[i]) for i, row in enumerate(gram)]
        directed = [i for i, length in enumerate(lengths) if length > tol]
        cosines = [[gram[i][j] / (lengths[i] * lengths[j]) for j in directed] for i in directed]
        centre = _centre(real, cosines, max_iter, tol) if directed else []
        scale = sum(lengths) / len(lengths)
        factors = [real.zero] * len(lengths)
        for i, part in zip(directed, centre, strict=True):
            factors[i] = part / lengths[i] * scale
        return factors

    return summed_multiples(job, multiples(job, formula, based=False), based=False)


def _centre(real: Any, cosines: Matrix, max_iter: int, tol: float) -> list[Real]:
    """The Karcher mean of unit vectors with these dot products, as a sum of multiples of them."""
    count = len(cosines)
    centre = [real.one / count] * count
    if (length := _length(real, centre, cosines)) < tol:
        centre, length = [real.one] + [real.zero] * (count - 1), real.one
    centre = [part / length for part in centre]
    for _ in range(max_iter):
        step = [real.zero] * count
        for i, row in enumerate(cosines):
            cosine = max(-real.one, min(real.one, _dot(row, centre)))
            angle = real.acos(cosine)
            if tol <= angle <= real.pi - tol:
                pull = angle / real.sin(angle) / count
                step = [part - pull * cosine * along for part, along in zip(step, centre, strict=True)]
                step[i] += pull
        if (size := _length(real, step, cosines)) < tol:
            break
        turn = real.sin(size) / size
        centre = [real.cos(size) * along + turn * part for along, part in zip(centre, step, strict=True)]
        if (length := _length(real, centre, cosines)) > tol:
            centre = [part / length for part in centre]
    return centre


def _dot(a: Sequence[Real], b: Sequence[Real]) -> Real:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _length(real: Any, parts: Sequence[Real], gram: Matrix) -> Real:
    """The length of a sum of multiples of vectors with this Gram matrix (rounded as that is: a square may fall below
    zero)."""
    square = sum(part * _dot(row, parts) for part, row in zip(parts, gram, strict=True))
    return real.sqrt(max(square, real.zero))


MULTISLERP = Builder(
    "multislerp",
    1,
    _multislerp,
    scratch=10,
    measured=True,
    method=Method(
        name="multislerp",
        title="Multi-SLERP",
        paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        base="optional",
        params=(
            WEIGHT,
            Param("normalize_weights", bool, "shared", "divide the weights by their sum", default=True),
            Param(
                "eps", float, "shared", "added to each length, and the length below which a mean is none", 1e-8, low=0.0
            ),
        ),
        doc="The weighted mean of the models' directions, scaled to the weighted mean of their lengths.",
        check=_cancelled,
    ),
)
KARCHER = Builder(
    "karcher",
    1,
    _karcher,
    scratch=10,
    measured=True,
    method=Method(
        name="karcher",
        title="Karcher Mean",
        paper="https://arxiv.org/abs/2603.04972",
        base="ordinary",
        params=(
            Param("max_iter", int, "shared", "at most so many steps towards the mean", default=10, low=0),
            Param("tol", float, "shared", "lengths and angles below this count as zero", default=1e-5, low=1e-12),
        ),
        doc="The mean of the models' directions on the sphere, scaled to the mean of their lengths.",
    ),
)
