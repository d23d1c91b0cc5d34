"""A new row by a map from the donor's space to the model's: turned main axes, or a basis of a few tokens for each axis.

Signs of axes take no part: what is made of them is the same with each turned round. Both are one matrix in the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kittybuild.builders.base import Job
from kittybuild.builders.transplant.pursuit import Atoms, pursued
from kittybuild.builders.transplant.sums import mean_row
from kittybuild.builders.transplant.table import Make, Shared, builder

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def _landmark_pca(job: Job, shared: Shared) -> Make:
    """Shared tokens are landmarks: both tables in their main axes around the mean of these, then the rotation of one
    onto the other (orthogonal Procrustes: Schönemann, Psychometrika 31, 1966). Axes: as many as both spaces have."""
    import numpy as np

    count = len(shared.ours)
    from_ = sum(shared.of_donor(shared.theirs[part]).sum(0) for part in shared.parts()) / count
    to = sum(shared.of_model(shared.ours[part]).sum(0) for part in shared.parts()) / count
    theirs, ours, both = (np.zeros((len(a), len(b))) for a, b in ((from_, from_), (to, to), (from_, to)))
    for part in shared.parts():
        left, right = shared.of_donor(shared.theirs[part]) - from_, shared.of_model(shared.ours[part]) - to
        theirs += left.T @ left
        ours += right.T @ right
        both += left.T @ right
    count = min(count, len(from_), len(to))
    near, far = axes(theirs)[:count], axes(ours)[:count]
    first, _, second = np.linalg.svd(near @ both @ far.T)
    turn = near.T @ (first @ second) @ far
    return lambda rows: (shared.of_donor(rows) - from_) @ turn + to


def axes(products: Array) -> Array:
    """The main axes of rows, the largest first, by the products of their columns: unit vectors [axes, width]."""
    import numpy as np

    _, vectors = np.linalg.eigh(products)
    return np.asarray(vectors.T[::-1])


def _sparse_basis(job: Job, shared: Shared) -> Make:
    """Each main axis of the shared tokens' rows in the narrower table (else the model's) as a combination of `k` of
    them (by orthogonal matching pursuit, around their mean). The same combinations of rows as they are make a basis in
    each table; a row's coordinates in the donor's, by least squares, are those of the new row in the model's. Both rows
    are seen from the mean of all rows of their table."""
    import numpy as np

    assert shared.donor is not None
    atoms = Atoms(shared.model, shared.ours)
    if shared.donor.shape[1] < shared.model.shape[1]:
        atoms = Atoms.of_donor(shared)
    centre = sum(atoms(part).sum(0) for part in shared.parts()) / len(shared.ours)
    atoms = replace(atoms, centre=centre)
    products = np.zeros((len(centre), len(centre)))
    for part in shared.parts():
        some = atoms(part)
        products += some.T @ some
    chosen, weights = pursued(axes(products), atoms, job.params["k"])
    theirs = [weight @ shared.of_donor(shared.theirs[some]) for some, weight in zip(chosen, weights, strict=True)]
    turn = np.linalg.pinv(np.stack(theirs)) @ shared.combined(chosen, weights)
    from_, to = mean_row(shared.donor), mean_row(shared.model)
    return lambda rows: (shared.of_donor(rows) - from_) @ turn + to


LANDMARK_PCA = builder("landmark_pca", _landmark_pca, version=2, machine=True)
STB = builder("stb", _sparse_basis, version=2, machine=True)
