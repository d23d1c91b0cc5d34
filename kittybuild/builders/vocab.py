"""Tables with a row for each token, gathered anew: embeddings, heads, and biases, on whichever axis the tokens lie."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.floats import numpy_dtype
from kittybuild.builders.numerics import tree_sums
from kittybuild.errors import BuildError
from kittybuild.model.rows import RowMap

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

LEAF = 1024
"""Rows of one leaf of the sum behind a mean."""


def _rows(job: Job) -> Combine:
    """Rows of the inputs, copied, averaged or zero, as the map says; then, as often, the mean of all of them.

    Inputs: tables that differ in the length of `axis` alone. Params: `axis`, and `rows`, the text of a RowMap, which
    takes rows from every input. An average is the sum in the working dtype, in the order of its sources, divided once.
    A mean is over the rows before it: sums in float64, leaf by leaf of rows, each leaf a tree. Raises BuildError KB503
    where rows of integers would be averaged.

    A row may come from anywhere, so all inputs are held in memory as they are stored, each once, and nothing else of
    their size: the peak is the sum of the tables.
    """
    import numpy as np

    axis, rows = job.params["axis"], RowMap.parse(job.params["rows"])
    shape = job.output.shape
    length, inner = shape[axis], math.prod(shape[axis + 1 :])
    wide = np.dtype(np.float64 if job.double else np.float32)
    if not job.output.dtype.is_float:
        wide = numpy_dtype(job.output.dtype)
        if rows.means or any(len(run.sources) > 1 for run in rows.runs):
            raise BuildError("KB503", "rows of integers cannot be averaged", hint="merge before it is quantised")
    gather = _Gather([job.whole(number) for number in rows.inputs()], rows, axis, math.prod(shape[:axis]), inner, wide)
    mean = gather.mean(length - rows.means) if rows.means else None

    def combine(block: Block) -> Array:
        first, last = block.start // inner, -(-(block.start + block.count) // inner)
        numbers = np.arange(first, last)
        outer, row = numbers // length, numbers % length
        found = gather.rows(outer, row)
        late = row >= length - rows.means
        if mean is not None and late.any():
            found = found.astype(np.float64)
            found[late] = mean[outer[late]]
        begin = block.start - first * inner
        return found.reshape(-1)[begin : begin + block.count]

    return combine


class _Gather:
    """The tables behind a map, and for each of its rows what it is made of.

    The rows of the map are put into classes by the inputs that they are made of; `kind` is the class of each, and
    `places[k]` the row of the k-th of its inputs.
    """

    def __init__(self, tables: list[Array], rows: RowMap, axis: int, outer: int, inner: int, wide: Any) -> None:
        import numpy as np

        self.outer, self.inner, self.wide = outer, inner, wide
        self.lengths = [table.shape[axis] for table in tables]
        self.tables = [table.reshape(-1, inner) for table in tables]

        made_of = [tuple(number for number, _ in run.sources) for run in rows.runs] + [()]
        self.classes = list(dict.fromkeys(made_of))
        counts = np.array([*(run.count for run in rows.runs), rows.means])
        starts = counts.cumsum() - counts
        within = np.arange(counts.sum()) - starts.repeat(counts)
        self.kind = np.array([self.classes.index(numbers) for numbers in made_of]).repeat(counts)
        self.places = []
        for k in range(max(map(len, made_of))):
            first = [run.sources[k][1] if k < len(run.sources) else 0 for run in rows.runs] + [0]
            self.places.append(np.array(first).repeat(counts) + within)

    def rows(self, outer: Array, row: Array) -> Array:
        """The rows with these numbers, at these places of the axes before: [len(row), inner] in the working dtype."""
        import numpy as np

        kinds = self.kind[row]
        if (kinds == kinds[0]).all():  # most blocks
            return self._made(kinds[0], outer, row)
        found = np.empty((len(row), self.inner), self.wide)
        for kind in np.unique(kinds):
            at = np.flatnonzero(kinds == kind)
            found[at] = self._made(kind, outer[at], row[at])
        return found

    def _made(self, kind: int, outer: Array, row: Array) -> Array:
        """Rows of one class."""
        import numpy as np

        total: Array | None = None
        for number, places in zip(self.classes[kind], self.places, strict=False):
            part = self.tables[number][outer * self.lengths[number] + places[row]].astype(self.wide)
            total = part if total is None else np.add(total, part, out=total)
        if total is None:
            return np.zeros((len(row), self.inner), self.wide)
        count = len(self.classes[kind])
        return total if count == 1 else np.divide(total, count, out=total)

    def mean(self, count: int) -> Array:
        """The mean of the rows before `count`, in float64: [outer, inner]."""
        import numpy as np

        total = np.zeros(self.outer * self.inner)
        outer = np.arange(self.outer)
        for start in range(0, count, LEAF):
            row = np.arange(start, min(start + LEAF, count))
            leaf = self.rows(outer.repeat(len(row)), np.tile(row, self.outer)).astype(np.float64)
            columns = leaf.reshape(self.outer, len(row), self.inner).swapaxes(1, 2).reshape(-1, len(row))
            total += tree_sums(columns)
        return (total / count).reshape(self.outer, self.inner)


ROWS = Builder("rows", 1, _rows, streamed=0, scratch=4, whole=0)
