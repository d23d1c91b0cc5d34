"""A new row from the nearest shared tokens: the donor's row as a combination of theirs there, the same one here.

Distances and cosines are exact products rounded once, so that the nearest are the same on every machine; weights by
least squares are not (docs/design, part 7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Job
from kittybuild.builders.numerics import exact_product, exact_slices
from kittybuild.builders.transplant.sums import row_products
from kittybuild.builders.transplant.table import Make, Shared, builder

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

LEAST_DISTANCE = 1e-6
"""So near is the same: a weight is one over the distance."""


def _interpolation(job: Job, shared: Shared) -> Make:
    """Params: `k` neighbours, by distance or `cosine_similarity`; `weight_scheme`: `distance_proportional` (one over
    the distance, or the cosine; their sum is 1), `least_squares`, or `barycentric` (least squares with the sum 1)."""
    import numpy as np

    k, cosine, scheme = (job.params[key] for key in ("k", "cosine_similarity", "weight_scheme"))
    lengths = np.concatenate([row_products(shared.of_donor(shared.theirs[part])) for part in shared.parts()])

    def make(numbers: Array) -> Array:
        rows = shared.of_donor(numbers)
        chosen, apart = nearest(rows, shared, lengths, k, cosine=cosine)
        if scheme == "distance_proportional":
            weights = -apart if cosine else 1.0 / np.maximum(np.sqrt(apart), LEAST_DISTANCE)
            total = weights[:, 0].copy()
            for n in range(1, weights.shape[1]):
                total += weights[:, n]
            weights /= np.where(total == 0.0, 1.0, total)[:, None]
        else:
            fitted = _barycentric if scheme == "barycentric" else least_squares
            weights = np.stack(
                [fitted(shared.of_donor(shared.theirs[some]), row) for some, row in zip(chosen, rows, strict=True)]
            )
        return shared.combined(chosen, weights)

    return make


def nearest(rows: Array, shared: Shared, lengths: Array, k: int, *, cosine: bool) -> tuple[Array, Array]:
    """The k shared tokens nearest to each row, the nearest first and of equal ones the first, and how far they are: the
    squared distance, or less the cosine. `lengths`: squared norms of the shared tokens' rows in the donor's table."""
    import numpy as np

    left, own = exact_slices(rows, rows.shape[1], rows=True), row_products(rows)
    chosen, apart = np.empty((len(rows), 0), np.int64), np.empty((len(rows), 0))
    for part in shared.parts():
        anchors = exact_slices(shared.of_donor(shared.theirs[part]), rows.shape[1], rows=True)
        products, sizes = exact_product(left, [slices.T for slices in anchors]), lengths[part]
        if cosine:
            far = -products / np.maximum(np.sqrt(own)[:, None] * np.sqrt(sizes), 1e-30)
        else:
            far = np.maximum((own[:, None] + sizes) - 2.0 * products, 0.0)
        apart = np.concatenate([apart, far], 1)
        here = np.arange(part.start, part.start + len(sizes))
        chosen = np.concatenate([chosen, np.broadcast_to(here, far.shape)], 1)
        order = np.argsort(apart, axis=1, kind="stable")[:, :k]
        apart, chosen = np.take_along_axis(apart, order, 1), np.take_along_axis(chosen, order, 1)
    return chosen, apart


def least_squares(near: Array, row: Array) -> Array:
    """The weights of neighbours [k, width] whose sum comes nearest to the row [width]; of several, the least."""
    import numpy as np

    return np.asarray(np.linalg.lstsq(near.T, row, rcond=None)[0])


def _barycentric(near: Array, row: Array) -> Array:
    """The same with the sum 1: weights of the differences from the first, which takes what is left of 1."""
    import numpy as np

    others = least_squares(near[1:] - near[0], row - near[0])
    return np.concatenate([[1.0 - others.sum()], others])


INTERPOLATION = builder("common_interpolation", _interpolation)
INTERPOLATION_FITTED = builder("fitted_interpolation", _interpolation, machine=True)
