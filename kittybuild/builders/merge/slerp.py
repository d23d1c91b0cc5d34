"""Spherical interpolation between two models: of whole tensors (SLERP), or also of their rows or columns (NuSLERP)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.elementary import arc_cosine, sine
from kittybuild.builders.gram import gram, pairs_of, summed_multiples, vectors
from kittybuild.builders.merge.common import WEIGHT
from kittybuild.builders.numerics import arc_cosine_weights, row_dots
from kittybuild.model.method import Method, Param

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

COLINEAR = 0.9995
TINY = 1e-8
FLAT = 1e-16
FAINT = 1e-7
CANCELLED = 1e-6
PAIRS = pairs_of(2)
NONE = (0.0, 0.0), (0.0, 0.0)


def _slerp(job: Job) -> Combine:
    """sin((1-t)θ)/sin θ · base + sin(tθ)/sin θ · other, θ the angle between the flattened tensors; linear if colinear.

    Inputs: base, other. Norms at or below 1e-8 count as 1 and |cos θ| > 0.9995 as colinear (mergekit 0.1.5;
    Shoemake 1985). Sums in float64 (portable tree); the two factors are rounded to the working dtype once. With weights
    instead of `t`: NuSLERP of the flattened tensors (as in mergekitty 0.3).
    """
    t = job.params.get("t")
    if t is None:
        based = job.params["base"]
        return summed_multiples(job, _whole(job, _share(job), based=based), based=based)
    (first, both), (_, second) = gram(job, based=False) or NONE
    norms = [norm if norm > TINY else 1.0 for norm in map(math.sqrt, (first, second))]
    cosine = both / (norms[0] * norms[1])
    near, far = (1.0 - t, t) if not abs(cosine) <= COLINEAR else arc_cosine_weights(cosine, t)
    return summed_multiples(job, [near, far], based=False)


def _nuslerp(job: Job) -> Combine:
    """sin((1-t)θ)/sin θ · one + sin(tθ)/sin θ · other with t = w_1 / (w_0 + w_1), linear where 1 - cos² θ <= 1e-16.

    θ is the angle between the flattened tensors, or without `nuslerp_flatten` between each two rows (of the last
    dimension), or then with `nuslerp_row_wise` between each two columns (along the first). A norm below 1e-7 counts as
    that much, weights whose sum is below 1e-6 as equal. With a base: of the differences from it, added to it (mergekit
    0.1.5). Each row is one tree; sums of rows, and of the elements of a column, go in order.
    """
    t, based, shape = _share(job), job.params["base"], job.output.shape
    width = shape[-1] if shape else 1
    if job.params["nuslerp_flatten"]:
        return summed_multiples(job, _whole(job, t, based=based, width=width), based=based)
    if job.params["nuslerp_row_wise"] and len(shape) > 1:
        return _by_columns(job, t, based=based)
    return _by_rows(t, based=based, width=width)


def _share(job: Job) -> float:
    """How far the weights of two models lead from the first to the second."""
    first, second = job.params["weight"]
    return 0.5 if abs(first + second) < CANCELLED else float(second / (first + second))


def _factors(products: Array, t: float) -> tuple[Array, Array]:
    """The factors of two vectors for each column of `products`: of one with itself, of both, of the other with itself.

    In float64, within some units of its last place; linear where the angle is not a number, and exact at the ends.
    """
    import numpy as np

    first, both, second = products
    norms = np.maximum(np.sqrt(first), FAINT) * np.maximum(np.sqrt(second), FAINT)
    cosine = (both / norms).clip(-1.0, 1.0)
    square = (1.0 - cosine) * (1.0 + cosine)
    angle, bent = arc_cosine(cosine), (square > FLAT) & (t not in (0.0, 1.0))
    near, far = (np.where(bent, sine(angle * part) / np.sqrt(square), part) for part in (1.0 - t, t))
    return near, far


def _whole(job: Job, t: float, *, based: bool, width: int | None = None) -> list[float]:
    """The factors of the flattened tensors."""
    import numpy as np

    (first, both), (_, second) = gram(job, based=based, width=width) or NONE
    near, far = _factors(np.array([[first], [both], [second]]), t)
    return [*near.tolist(), *far.tolist()]


def _by_rows(t: float, *, based: bool, width: int) -> Combine:
    import numpy as np

    def combine(block: Block) -> Array:
        given = vectors(block, based=based)
        for vector, factors in zip(given, _factors(row_dots(given, PAIRS, width), t), strict=True):
            rows = vector.reshape(-1, width)
            rows *= factors.astype(vector.dtype)[:, None]
        mixed = np.add(given[0], given[1], out=given[0])
        return np.add(block.inputs[0], mixed, out=block.inputs[0]) if based else mixed

    return combine


def _by_columns(job: Job, t: float, *, based: bool) -> Combine:
    import numpy as np

    products = np.zeros((len(PAIRS), math.prod(job.output.shape[1:])))
    for block in job.scan():
        given = vectors(block, based=based)
        for sums, (i, j) in zip(products, PAIRS, strict=True):
            terms = given[i].astype(np.float64)
            terms *= given[j]
            for part, columns in _along(block, len(sums)):
                sums[columns] += terms[part]
    factors = [each.astype(np.float64 if job.double else np.float32) for each in _factors(products, t)]

    def combine(block: Block) -> Array:
        given = vectors(block, based=based)
        for vector, factor in zip(given, factors, strict=True):
            for part, columns in _along(block, len(factor)):
                vector[part] *= factor[columns]
        mixed = np.add(given[0], given[1], out=given[0])
        return np.add(block.inputs[0], mixed, out=block.inputs[0]) if based else mixed

    return combine


def _along(block: Block, columns: int) -> Iterator[tuple[slice, slice]]:
    """A block cut where the first index changes: each part, and the columns that it has."""
    start = 0
    while start < block.count:
        column = (block.start + start) % columns
        end = min(block.count, start + columns - column)
        yield slice(start, end), slice(column, column + end - start)
        start = end


def _unclear(params: Mapping[str, Any]) -> str | None:
    """The complaint where SLERP is not told how far to go, or twice."""
    weights = params["weight"]
    given = [weight for weight in weights if weight is not None]
    if params["t"] is None:
        if not given:
            return "it needs 't', or a 'weight' for each of two models"
        if len(weights) != 2 or len(given) != 2:
            return "with 'weight' it takes two models beside a base model, and a weight for each"
    elif given:
        return "it takes 't' or 'weight', not both"
    elif not params["base"] or len(weights) != 1:
        return "with 't' it takes a base model, at 0, and one other, at 1"
    return None


SLERP = Builder(
    "slerp",
    1,
    _slerp,
    scratch=10,
    measured=True,
    method=Method(
        name="slerp",
        title="SLERP",
        paper="https://en.wikipedia.org/wiki/Slerp",
        base="optional",
        most=2,
        params=(
            Param("t", float, "shared", "0 is the base model, 1 the other"),
            Param("weight", float, "input", "instead of `t`: how much of this model"),
        ),
        doc="Goes along the arc from one model to another, over the whole tensor: with `t` from the base model to the"
        " other one, with weights between two models (on their differences from a base model, if there is one).",
        check=_unclear,
    ),
)
NUSLERP = Builder(
    "nuslerp",
    1,
    _nuslerp,
    scratch=10,
    measured=True,
    rows=True,
    method=Method(
        name="nuslerp",
        title="NuSLERP",
        paper="https://en.wikipedia.org/wiki/Slerp",
        base="optional",
        least=2,
        most=2,
        params=(
            WEIGHT,
            Param(
                "nuslerp_flatten", bool, "shared", "one arc for the whole tensor, not one for each row", default=True
            ),
            Param(
                "nuslerp_row_wise",
                bool,
                "shared",
                "where it is not flattened: one arc for each column, not for each row",
                default=False,
            ),
        ),
        doc="Goes along the arc from one model to another as far as their weights say: over the whole tensor, or in"
        " each row or column.",
    ),
)
