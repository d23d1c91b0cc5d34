"""A new row from a few shared tokens that together make the donor's row: orthogonal matching pursuit.

Pati, Rezaiifar, Krishnaprasad (1993); for tokens: Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation
via Orthogonal Matching Pursuit (2025). The same combination of the model's rows is the new row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Job
from kittybuild.builders.transplant.table import AT_ONCE, Shared, builder

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

_ROWS = 256
DEPENDENT = 1e-6
"""A token of which less than this is left beside those chosen before adds nothing."""


def _omp(job: Job, shared: Shared) -> Array:
    """Params: `k`, tokens of a row at most."""
    import numpy as np

    made = np.empty((len(shared.fresh), shared.model.shape[1]))
    anchors, k = shared.anchors, job.params["k"]
    several = max(1, min(_ROWS, AT_ONCE // max(1, k * anchors.shape[1] + len(anchors))))
    for start in range(0, len(made), several):
        rows = shared.rows_of_donor(shared.fresh[start : start + several])
        made[start : start + several] = shared.combined(*pursued(rows, anchors, k))
    return made


def pursued(rows: Array, atoms: Array, k: int) -> tuple[Array, Array]:
    """For each row, k atoms and their weights, in float64: each atom the one with the largest product with what is
    still left of the row (of equal ones the first), the weights by least squares. Atoms that add nothing weigh 0."""
    import numpy as np

    count, width = rows.shape
    chosen = np.zeros((count, k), np.int64)
    basis = np.zeros((count, k, width))
    triangle = np.tile(np.eye(k), (count, 1, 1))
    parts = np.zeros((count, k))
    rest, each = rows.copy(), np.arange(count)
    taken = np.zeros((count, len(atoms)), bool)
    for step in range(k):
        scores = np.abs(rest @ atoms.T)
        scores[taken] = -1.0
        chosen[:, step] = scores.argmax(1)
        taken[each, chosen[:, step]] = True
        atom = atoms[chosen[:, step]]
        left = atom.copy()
        for _ in range(2):  # once more, for what rounding left
            shares = np.einsum("nkw,nw->nk", basis[:, :step], left)
            left -= np.einsum("nkw,nk->nw", basis[:, :step], shares)
            triangle[:, :step, step] += shares
        length = np.sqrt(np.einsum("nw,nw->n", left, left))
        adds = length > DEPENDENT * np.sqrt(np.einsum("nw,nw->n", atom, atom))
        triangle[:, step, step] = np.where(adds, length, 1.0)
        triangle[~adds, :step, step] = 0.0
        basis[:, step] = np.where(adds[:, None], left / np.where(adds, length, 1.0)[:, None], 0.0)
        parts[:, step] = np.einsum("nw,nw->n", basis[:, step], rest)
        rest -= basis[:, step] * parts[:, step, None]
    return chosen, np.linalg.solve(triangle, parts[..., None])[..., 0]


OMP = builder("omp", _omp, machine=True)
