"""A new row by a map from the donor's space to the model's: turned main axes, or a basis of a few tokens for each axis.

Signs of axes take no part: what is made of them is the same with each turned round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Job
from kittybuild.builders.transplant.pursuit import pursued
from kittybuild.builders.transplant.sums import mean_row
from kittybuild.builders.transplant.table import Shared, builder

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def _landmark_pca(job: Job, shared: Shared) -> Array:
    """Shared tokens are landmarks: both tables in their main axes around the mean of these, then the rotation of one
    onto the other (orthogonal Procrustes: Schönemann, Psychometrika 31, 1966). Axes: as many as both spaces have."""
    import numpy as np

    theirs, ours = shared.anchors, shared.model[shared.ours].astype(np.float64)
    from_, to = mean_row(theirs), mean_row(ours)
    theirs -= from_
    ours -= to
    count = min(len(ours), theirs.shape[1], ours.shape[1])
    near, far = axes(theirs)[:count], axes(ours)[:count]
    left, _, right = np.linalg.svd((theirs @ near.T).T @ (ours @ far.T))
    turned = (shared.rows_of_donor(shared.fresh) - from_) @ near.T @ (left @ right)
    return np.asarray(turned @ far + to)


def axes(rows: Array) -> Array:
    """The main axes of rows, the largest first: unit vectors [axes, width]."""
    import numpy as np

    _, vectors = np.linalg.eigh(rows.T @ rows)
    return np.asarray(vectors.T[::-1])


def _sparse_basis(job: Job, shared: Shared) -> Array:
    """Each main axis of the shared tokens' rows in the donor's table as a combination of `k` of them (by orthogonal
    matching pursuit); a row's coordinates in these vectors, by least squares, in the model's table make the new row."""
    import numpy as np

    anchors = shared.anchors
    centred = anchors - mean_row(anchors)
    main = axes(centred)[: min(len(anchors), anchors.shape[1])]
    chosen, weights = pursued(main, anchors, job.params["k"])
    basis = np.stack([weight @ anchors[some] for some, weight in zip(chosen, weights, strict=True)])
    coordinates = np.linalg.lstsq(basis.T, shared.rows_of_donor(shared.fresh).T, rcond=None)[0].T
    return np.asarray(coordinates @ shared.combined(chosen, weights))


LANDMARK_PCA = builder("landmark_pca", _landmark_pca, machine=True)
STB = builder("stb", _sparse_basis, machine=True)
