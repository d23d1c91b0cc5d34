"""A new row from a few shared tokens that together make the donor's row: orthogonal matching pursuit.

Pati, Rezaiifar, Krishnaprasad (1993); for tokens: Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation
via Orthogonal Matching Pursuit (2025). The same combination of the model's rows is the new row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import Job
from kittybuild.builders.transplant.table import AT_ONCE, Make, Shared, builder

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

_ATOMS = 4096
DEPENDENT = 1e-6
"""A token of which less than this is left beside those chosen before adds nothing."""


def _omp(job: Job, shared: Shared) -> Make:
    """Params: `k`, tokens of a row at most."""
    atoms, k = Atoms.of_donor(shared), job.params["k"]
    return lambda rows: shared.combined(*pursued(shared.of_donor(rows), atoms, k))


@dataclass(frozen=True)
class Atoms:
    """The rows of shared tokens in one of the tables, by their numbers there; as they are, or seen from a centre."""

    table: Array
    places: Array
    centre: Array | None = None

    @classmethod
    def of_donor(cls, shared: Shared) -> Atoms:
        """Those of the donor's table."""
        assert shared.donor is not None
        return cls(shared.donor, shared.theirs)

    def __call__(self, which: Array | slice, dtype: Any = "float64") -> Array:
        """Those of these numbers."""
        rows: Array = self.table[self.places[which]].astype(dtype)
        return rows if self.centre is None else rows - self.centre.astype(dtype)

    def likest(self, rest: Array, taken: Array) -> Array:
        """For each row, the token, none of those `taken`, with the largest product with it, of equal ones the first.

        Products in float32, or float64 where the table is: they choose, and nothing is made of them.
        """
        import numpy as np

        wide = np.dtype(np.float64 if self.table.dtype == np.float64 else np.float32)
        best, found = np.full(len(rest), -1.0, wide), np.zeros(len(rest), np.int64)
        narrow = rest.astype(wide)
        for start in range(0, len(self.places), _ATOMS):
            atoms = self(slice(start, start + _ATOMS), wide)
            scores = narrow @ atoms.T
            np.abs(scores, out=scores)
            row, place = np.nonzero((taken >= start) & (taken < start + len(atoms)))
            scores[row, taken[row, place] - start] = -1.0
            here = scores.argmax(1)
            score = np.take_along_axis(scores, here[:, None], 1)[:, 0]
            found = np.where(score > best, start + here, found)
            best = np.maximum(best, score)
        return found


def pursued(rows: Array, atoms: Atoms, k: int) -> tuple[Array, Array]:
    """For each row, k shared tokens and their weights, in float64: each token the one with the largest product with
    what is still left of the row, the weights by least squares. Tokens that add nothing weigh 0."""
    import numpy as np

    several = max(1, AT_ONCE // max(1, k * rows.shape[1]))
    found = [_pursued(rows[start : start + several], atoms, k) for start in range(0, len(rows), several)]
    chosen, weights = zip(*found, strict=True)
    return np.concatenate(chosen), np.concatenate(weights)


def _pursued(rows: Array, atoms: Atoms, k: int) -> tuple[Array, Array]:
    """The same, all rows at once: an orthonormal basis of each row's tokens is held, and their triangle in it."""
    import numpy as np

    count, width = rows.shape
    chosen = np.zeros((count, k), np.int64)
    basis = np.zeros((count, k, width))
    triangle = np.tile(np.eye(k), (count, 1, 1))
    parts = np.zeros((count, k))
    rest = rows.copy()
    for step in range(k):
        chosen[:, step] = atoms.likest(rest, chosen[:, :step])
        atom = atoms(chosen[:, step])
        left, before = atom.copy(), basis[:, :step]
        for _ in range(2):  # once more, for what rounding left
            shares = np.matmul(before, left[..., None])[..., 0]
            left -= np.matmul(shares[:, None], before)[:, 0]
            triangle[:, :step, step] += shares
        length = np.sqrt(np.einsum("nw,nw->n", left, left))
        adds = length > DEPENDENT * np.sqrt(np.einsum("nw,nw->n", atom, atom))
        triangle[:, step, step] = np.where(adds, length, 1.0)
        triangle[~adds, :step, step] = 0.0
        basis[:, step] = np.where(adds[:, None], left / np.where(adds, length, 1.0)[:, None], 0.0)
        parts[:, step] = np.einsum("nw,nw->n", basis[:, step], rest)
        rest -= basis[:, step] * parts[:, step, None]
    return chosen, np.linalg.solve(triangle, parts[..., None])[..., 0]


OMP = builder("omp", _omp, version=2, machine=True)
