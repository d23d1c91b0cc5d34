"""Methods that need no donor's table: the mean of the model's rows, zeros, random rows, rows of pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Job
from kittybuild.builders.transplant.sums import LEAF, mean_row
from kittybuild.builders.transplant.table import Make, Shared, builder, drawn
from kittybuild.model.rows import RowMap

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

_DRAWN = 0


def _mean(job: Job, shared: Shared) -> Make:
    import numpy as np

    mean = mean_row(shared.model)
    return lambda rows: np.tile(mean, (len(rows), 1))


def _zero(job: Job, shared: Shared) -> Make:
    import numpy as np

    return lambda rows: np.zeros((len(rows), shared.model.shape[1]))


def _randn(job: Job, shared: Shared) -> Make:
    return lambda rows: drawn(job, _DRAWN, rows, shared.model.shape[1])


def _john_hewitt(job: Job, shared: Shared) -> Make:
    """Normally distributed rows with the mean and the covariance of the model's (Hewitt, Initializing New Word
    Embeddings for Pretrained Language Models, 2021). The root of the covariance is the symmetric one."""
    import numpy as np

    mean = mean_row(shared.model)
    covariance = np.zeros((len(mean), len(mean)))
    for start in range(0, len(shared.model), LEAF):
        centred = shared.model[start : start + LEAF].astype(np.float64) - mean
        covariance += centred.T @ centred
    values, vectors = np.linalg.eigh(covariance / max(1, len(shared.model) - 1))
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return lambda rows: mean + drawn(job, _DRAWN, rows, len(mean)) @ root


def _subword(job: Job, shared: Shared) -> Make:
    """A sum or weighted mean of the rows of a token's pieces; without pieces, the mean of all rows.

    Params: `pieces`, a RowMap of the model's rows for each row of the output; `subword_method`: `mean`, `sum`, `first`,
    `last`, and means where the n-th piece weighs n (`rising`), or the n-th from the end (`falling`).
    """
    import numpy as np

    pieces = [[row for _, row in sources] for sources in RowMap.parse(job.params["pieces"]).rows()]
    instead = None if all(pieces[row] for row in shared.fresh.tolist()) else mean_row(shared.model)
    way = job.params["subword_method"]

    def make(rows: Array) -> Array:
        found = np.zeros((len(rows), shared.model.shape[1]))
        for number, row in enumerate(rows.tolist()):
            chosen = pieces[row]
            if not chosen:
                found[number] = instead
                continue
            weights = piece_weights(way, len(chosen))
            for piece, weight in zip(shared.of_model(np.array(chosen)), weights, strict=True):
                found[number] += piece * weight
            found[number] /= 1.0 if way == "sum" else sum(weights)
        return found

    return make


def piece_weights(way: str, count: int) -> list[float]:
    """How much each of so many pieces weighs."""
    rising = [float(n + 1) for n in range(count)]
    ends = {"first": [1.0, *[0.0] * (count - 1)], "last": [*[0.0] * (count - 1), 1.0]}
    return {"rising": rising, "falling": rising[::-1], **ends}.get(way, [1.0] * count)


MEAN = builder("mean", _mean)
ZERO = builder("zero", _zero)
RANDN = builder("randn", _randn)
JOHN_HEWITT = builder("john_hewitt", _john_hewitt, machine=True)
SUBWORD = builder("subword", _subword)
