"""A new row from the nearest shared tokens: the donor's row as a combination of theirs there, the same one here.

Distances and cosines are exact products rounded once, so that the nearest are the same on every machine; weights by
least squares are not (docs/design, part 7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Job
from kittybuild.builders.numerics import exact_product, exact_slices
from kittybuild.builders.transplant.sums import row_products
from kittybuild.builders.transplant.table import AT_ONCE, Shared, builder

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

_ROWS, _ANCHORS = 256, 4096
LEAST_DISTANCE = 1e-6
"""So near is the same: a weight is one over the distance."""


def _interpolation(job: Job, shared: Shared) -> Array:
    """Params: `k` neighbours, by distance or `cosine_similarity`; `weight_scheme`: `distance_proportional` (one over
    the distance, or the cosine; their sum is 1), `least_squares`, or `barycentric` (least squares with the sum 1)."""
    import numpy as np

    cosine, scheme = job.params["cosine_similarity"], job.params["weight_scheme"]
    made = np.empty((len(shared.fresh), shared.model.shape[1]))
    lengths = row_products(shared.donor[shared.theirs])  # type: ignore[index]
    width = shared.donor.shape[1]  # type: ignore[union-attr]
    several = max(1, min(_ROWS, AT_ONCE // max(1, job.params["k"] * width)))
    for start in range(0, len(made), several):
        rows = shared.rows_of_donor(shared.fresh[start : start + several])
        chosen, apart = nearest(rows, shared, lengths, job.params["k"], cosine=cosine)
        if scheme == "distance_proportional":
            weights = -apart if cosine else 1.0 / np.maximum(np.sqrt(apart), LEAST_DISTANCE)
            total = weights[:, 0].copy()
            for n in range(1, weights.shape[1]):
                total += weights[:, n]
            weights /= np.where(total == 0.0, 1.0, total)[:, None]
        else:
            near = shared.rows_of_donor(shared.theirs[chosen.reshape(-1)]).reshape(*chosen.shape, width)
            weights = (_barycentric if scheme == "barycentric" else _least_squares)(near, rows)
        made[start : start + several] = shared.combined(chosen, weights)
    return made


def nearest(rows: Array, shared: Shared, lengths: Array, k: int, *, cosine: bool) -> tuple[Array, Array]:
    """The k shared tokens nearest to each row, the nearest first and of equal ones the first, and how far they are: the
    squared distance, or less the cosine. `lengths`: squared norms of the shared tokens' rows in the donor's table."""
    import numpy as np

    left, own = exact_slices(rows, rows.shape[1], rows=True), row_products(rows)
    chosen, apart = np.empty((len(rows), 0), np.int64), np.empty((len(rows), 0))
    for start in range(0, len(lengths), _ANCHORS):
        anchors = shared.rows_of_donor(shared.theirs[start : start + _ANCHORS])
        products = exact_product(left, [part.T for part in exact_slices(anchors, rows.shape[1], rows=True)])
        sizes = lengths[start : start + _ANCHORS]
        if cosine:
            far = -products / np.maximum(np.sqrt(own)[:, None] * np.sqrt(sizes), 1e-30)
        else:
            far = np.maximum((own[:, None] + sizes) - 2.0 * products, 0.0)
        apart = np.concatenate([apart, far], 1)
        chosen = np.concatenate([chosen, np.broadcast_to(np.arange(start, start + len(anchors)), far.shape)], 1)
        order = np.argsort(apart, axis=1, kind="stable")[:, :k]
        apart, chosen = np.take_along_axis(apart, order, 1), np.take_along_axis(chosen, order, 1)
    return chosen, apart


def _least_squares(near: Array, rows: Array) -> Array:
    """For each row [width], the weights of its neighbours [k, width] that come nearest to it; of several, the least."""
    import numpy as np

    return np.stack([np.linalg.lstsq(some.T, row, rcond=None)[0] for some, row in zip(near, rows, strict=True)])


def _barycentric(near: Array, rows: Array) -> Array:
    """The same with the sum 1: weights of the differences from the first, which takes what is left of 1."""
    import numpy as np

    others = _least_squares(near[:, 1:] - near[:, :1], rows - near[:, 0])
    return np.concatenate([1.0 - others.sum(1, keepdims=True), others], 1)


INTERPOLATION = builder("common_interpolation", _interpolation)
INTERPOLATION_FITTED = builder("fitted_interpolation", _interpolation, machine=True)
