"""Which elements of each difference are kept: all, the largest, all but the least and the largest, or by chance.

A sparsifier looks at a job and gives one Trim for each model. Its parameters are those of the job: `density`, `gamma`,
`epsilon`, `seed`, `tensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Job
from kittybuild.builders.merge.common import divide, rounding
from kittybuild.builders.random import Draws, limit, limits
from kittybuild.builders.selection import largest
from kittybuild.builders.threshold import EVERYTHING, NOTHING, Threshold, as_bits, kept, masked
from kittybuild.tensors import TensorSpec

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

Trim = Callable[["Array", int], "Array"]
"""A difference in place with zeros for all that is not kept; the number is the index of its first element."""
Sparsifier = Callable[[Job], Sequence[Trim]]


def whole(delta: Array, start: int) -> Array:
    """Everything is kept."""
    return delta


def nothing(delta: Array, start: int) -> Array:
    """Nothing is kept."""
    delta.fill(0)
    return delta


def dense(job: Job) -> Sequence[Trim]:
    """Every model is kept whole."""
    return [whole] * len(job.params["weight"])


def by_magnitude(job: Job) -> Sequence[Trim]:
    """The int(density · n) largest magnitudes, at least one where density > 0; among equals the lowest index is kept
    (Yadav et al. 2023; mergekit 0.1.5, save the order of equals).
    """
    counts = [kept(job.output.numel, density) for density in job.params["density"]]
    return [_band(NOTHING, threshold) for threshold in _thresholds(job, counts, range(len(counts)))]


def without_outliers(job: Job) -> Sequence[Trim]:
    """Of all magnitudes, ordered as `by_magnitude` keeps them, the int(gamma · n) first are left out, the next
    int(density · n) are kept; fewer are left out where fewer than both together are there.

    (Davari, Belilovsky 2023, Model Breadcrumbs. mergekit before 0.1.5 keeps nothing where gamma · n < 1.)
    """
    numel, counts = job.output.numel, []
    for density, gamma in zip(job.params["density"], job.params["gamma"], strict=True):
        wanted = min(numel, max(0, int(density * numel)))
        last = min(numel, wanted + int(gamma * numel))
        counts += [last - wanted, last] if wanted else [0, 0]
    found = _thresholds(job, counts, [place // 2 for place in range(len(counts))])
    return [_band(outliers, both) for outliers, both in zip(found[::2], found[1::2], strict=True)]


def _band(outliers: Threshold, both: Threshold) -> Trim:
    """Keeps what `both` keeps and `outliers`, which keeps none but of these, does not."""
    if outliers == NOTHING:
        return {EVERYTHING: whole, NOTHING: nothing}.get(both, both.trim)

    def trim(delta: Array, start: int) -> Array:
        magnitudes = abs(delta)
        return masked(delta, both.mask(magnitudes, start) ^ outliers.mask(magnitudes, start))

    return trim


def _thresholds(job: Job, counts: Sequence[int], of: Sequence[int]) -> list[Threshold]:
    """The thresholds of these counts, each of the difference of the model `of` it."""
    import numpy as np

    def magnitudes(block: Block, which: Collection[int]) -> dict[int, Array]:
        base, *models = block.inputs
        for index in which:
            np.subtract(models[index], base, out=models[index])
            np.abs(models[index], out=models[index])
        return {index: models[index] for index in which}

    def scan(which: Collection[int]) -> Iterator[tuple[int, dict[int, Array]]]:
        return ((block.start, magnitudes(block, which)) for block in job.scan())

    def part(which: Collection[int], start: int, count: int) -> dict[int, Array]:
        return magnitudes(job.part(start, count), which)

    return largest(scan, job.output.numel, counts, of=of, part=part, double=job.double)


def by_chance(job: Job) -> Sequence[Trim]:
    """Each element with the probability `density` (Yu et al. 2023, DARE)."""
    return [_chance(job, index, density) for index, density in enumerate(job.params["density"])]


def _chance(job: Job, index: int, density: float) -> Trim:
    if not 0 < density < 1:
        return nothing if density <= 0 else whole
    draws, bound = Draws(job.params["seed"], job.params["tensor"], index), limit(density)
    divisor = rounding(job)(density) if job.params["rescale"] == "probability" else 1.0

    def trim(delta: Array, start: int) -> Array:
        return divide(masked(delta, draws.integers(start, len(delta)) <= bound), divisor)

    return trim


def by_rank(job: Job) -> Sequence[Trim]:
    """Each element with a probability that rises with its magnitude, from density - epsilon for the least of its row
    to density + epsilon for the largest, in equal steps; among equals it rises with the index. The one element of a
    row of one has the probability `density`. (Deep et al. 2024, DELLA-Merging; mergekit 0.1.5, save rows of one.)
    """
    models = zip(job.params["density"], job.params["epsilon"], strict=True)
    return [_rank(job, index, density, epsilon) for index, (density, epsilon) in enumerate(models)]


def row_width(spec: TensorSpec) -> int:
    """Elements of a row, at least 1 even where there are none."""
    return max(1, spec.shape[-1]) if spec.shape else 1


def _rank(job: Job, index: int, density: float, epsilon: float) -> Trim:
    if not 0 < density < 1:
        return nothing if density <= 0 else whole
    width, divided = row_width(job.output), job.params["rescale"] == "probability"
    draws = Draws(job.params["seed"], job.params["tensor"], index)

    def trim(delta: Array, start: int) -> Array:
        bounds = limits(_probabilities(width, density, epsilon))
        places = _ascending(delta.reshape(-1, width))
        masked(delta, draws.integers(start, len(delta)) <= _placed(bounds, places))
        del bounds  # as long as the tensor where that is one row
        if divided:
            delta /= _placed(_probabilities(width, density, epsilon).astype(delta.dtype), places)
        return delta

    return trim


def _probabilities(width: int, density: float, epsilon: float) -> Array:
    """The probability of each rank of a row, float64."""
    import numpy as np

    if width == 1:
        return np.full(1, density)
    return np.arange(width) / (width - 1) * (2 * epsilon) + (density - epsilon)


def _ascending(rows: Array) -> Array:
    """For each rank of each row, by rising magnitude and among equals by rising column, its element: int64, an index of
    the flat array.

    Magnitude and column of a float32 are sorted as one integer: as no two are equal, the fastest sort is as good as
    a stable one.
    """
    import numpy as np

    magnitudes = as_bits(abs(rows))
    if magnitudes.itemsize == 8:
        places = magnitudes.argsort(axis=1, kind="stable")
    else:
        places = magnitudes.astype(np.int64)
        del magnitudes
        places <<= 32
        places |= np.arange(rows.shape[1])
        places.sort(axis=1)
        places &= 0xFFFF_FFFF
    places += np.arange(0, rows.size, rows.shape[1])[:, None]
    return places


def _placed(by_rank: Array, places: Array) -> Array:
    """The value of its rank for each element, flat."""
    import numpy as np

    found = np.empty(places.size, dtype=by_rank.dtype)
    found[places.reshape(-1)] = np.tile(by_rank, len(places))
    return found
