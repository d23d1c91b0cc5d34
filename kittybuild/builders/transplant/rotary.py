"""A new row from a few shared tokens, each turned as if it stood at another position (rotary embeddings).

The method `mp_rope` of mergekit-tokensurgeon 0.1.5, which has no paper: by what its program makes of small tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Job
from kittybuild.builders.transplant.neighbours import least_squares
from kittybuild.builders.transplant.pursuit import Atoms
from kittybuild.builders.transplant.table import AT_ONCE, Make, Shared, builder

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def _mp_rope(job: Job, shared: Shared) -> Make:
    """Matching pursuit: each step takes the token with the largest product with what is left of the row, turns it to
    the position where it comes nearest to that, and takes its share away. Then the weights of all turned tokens are
    fitted together, and the model's rows, turned to the same positions, make the new row with these weights.

    Params: `k` tokens; `heads` and `bases` of the donor and of the model: a row is cut into so many heads.
    """
    import numpy as np

    k = job.params["k"]
    atoms, (theirs, ours) = Atoms.of_donor(shared), job.params["heads"]
    their_base, our_base = job.params["bases"]
    wide = shared.of_donor(shared.fresh[:0]).shape[1] + shared.model.shape[1]
    several = max(1, AT_ONCE // (k * wide))

    def some(rows: Array) -> Array:
        rest = rows.copy()
        chosen, positions = np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k))
        turned = np.zeros((len(rows), k, rows.shape[1]))
        for step in range(k):
            chosen[:, step] = atoms.likest(rest, chosen[:, :step])
            atom = atoms(chosen[:, step])
            positions[:, step] = position(atom, rest, theirs, their_base)
            turned[:, step] = atom = rotated(atom, positions[:, step], theirs, their_base)
            square = np.einsum("nw,nw->n", atom, atom)
            share = np.einsum("nw,nw->n", atom, rest) / np.where(square > 0.0, square, 1.0)
            rest -= share[:, None] * atom
        weights = np.stack([least_squares(near, row) for near, row in zip(turned, rows, strict=True)])
        total = np.zeros((len(rows), shared.model.shape[1]))
        for step in range(k):
            row = rotated(shared.of_model(shared.ours[chosen[:, step]]), positions[:, step], ours, our_base)
            total += weights[:, step, None] * row
        return total

    def make(numbers: Array) -> Array:
        starts = range(0, len(numbers), several)
        return np.concatenate([some(shared.of_donor(numbers[start : start + several])) for start in starts])

    return make


def position(atoms: Array, rest: Array, heads: int, base: float) -> Array:
    """For each row the position to which an atom must be turned to point where `rest` does, or less where it does.

    The angles of all pairs, between -π and π, fitted by one position (least squares). Of the two, the one nearer to 0.
    """
    import numpy as np

    frequencies = _frequencies(base, rest.shape[1] // heads)
    (x, y), (u, v) = _pairs(atoms, heads), _pairs(rest, heads)
    cross, dot = x * v - y * u, x * u + y * v
    scale = heads * float((frequencies * frequencies).sum())
    to, away = ((np.arctan2(s * cross, s * dot) * frequencies).sum((1, 2)) / scale for s in (1.0, -1.0))
    return np.asarray(np.where(np.abs(away) < np.abs(to), away, to))


def rotated(rows: Array, positions: Array, heads: int, base: float) -> Array:
    """Rows turned as queries and keys at these positions are in a Llama (Su et al., RoFormer, 2021): the n-th number
    of the first half of a head with the n-th of the second half."""
    import numpy as np

    angles = positions[:, None, None] * _frequencies(base, rows.shape[1] // heads)
    x, y = _pairs(rows, heads)
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.concatenate([x * cosine - y * sine, y * cosine + x * sine], 2).reshape(rows.shape)


def _pairs(rows: Array, heads: int) -> tuple[Array, Array]:
    """The first and the second halves of all heads: [rows, heads, half] each."""
    cut = rows.reshape(len(rows), heads, 2, -1)
    return cut[:, :, 0], cut[:, :, 1]


def _frequencies(base: float, size: int) -> Array:
    """How far each pair of a head of this size turns from one position to the next."""
    import numpy as np

    return np.asarray(base ** (-np.arange(0, size, 2) / size))


MP_ROPE = builder("mp_rope", _mp_rope, machine=True)
