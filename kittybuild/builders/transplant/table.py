"""What all methods have in common: which rows are copied, which are made, and of what; then the table, block by block.

A method sees only tables and numbers of rows, and makes the new rows in float64, whatever the size of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.transplant.normal import normals
from kittybuild.builders.transplant.undertrained import undertrained
from kittybuild.model.rows import RowMap

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

MODEL, DONOR = 0, 1
AT_ONCE = 1 << 24
"""Numbers that a method holds at once, beside tables."""
_NOISE = 1


@dataclass(frozen=True)
class Shared:
    """The two tables and what they have in common: row `ours[n]` of the model means what row `theirs[n]` of the donor
    does. `fresh`: the rows of the output, which are the donor's, that are to be made."""

    model: Array
    donor: Array | None
    ours: Array
    theirs: Array
    fresh: Array

    @property
    def anchors(self) -> Array:
        """The donor's rows of shared tokens, in float64."""
        return self.rows_of_donor(self.theirs)

    def rows_of_donor(self, rows: Array) -> Array:
        """Rows of the donor's table in float64."""
        import numpy as np

        assert self.donor is not None  # whoever asks for it lists it among the inputs
        return self.donor[rows].astype(np.float64)

    def combined(self, chosen: Array, weights: Array) -> Array:
        """For each row, the sum of weights[row, n] times the model's row of the shared token chosen[row, n], added in
        order of n: [rows, width] in float64."""
        import numpy as np

        total = np.zeros((len(chosen), self.model.shape[1]))
        for n in range(chosen.shape[1]):
            total += weights[:, n, None] * self.model[self.ours[chosen[:, n]]].astype(np.float64)
        return total


Method = Callable[[Job, Shared], "Array"]
"""Makes the fresh rows: [fresh, width of the model] in float64."""


def builder(name: str, method: Method, *, machine: bool = False) -> Builder:
    """The builder of a method. Inputs: the model's table, then the donor's if it counts, both [rows, width].

    Params: `rows`, a RowMap over (0) the model's rows and (1) rows to be made, by their number in the donor's table;
    `anchors`, a RowMap of pairs, one of each table; `scale` and `noise` (with `seed` and `tensor`) of new rows, if they
    have any; `unused`, two RowMaps of rows that nobody trained, where such tokens shall not count; and the method's.
    """

    def prepare(job: Job) -> Combine:
        return _table(job, method)

    return Builder(f"transplant_{name}", 1, prepare, streamed=0, machine=machine)


def _table(job: Job, method: Method) -> Combine:
    import numpy as np

    kind, place = _row_kinds(RowMap.parse(job.params["rows"]))
    pairs = [tuple(row for _, row in pair) for pair in RowMap.parse(job.params["anchors"]).rows()]
    ours, theirs = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    model, donor = job.whole(MODEL), job.whole(DONOR) if len(job.inputs) > 1 else None
    if "unused" in job.params:
        assert donor is not None
        bad, worse = (
            undertrained(table, [row for ((_, row),) in RowMap.parse(text).rows()])
            for table, text in zip((model, donor), job.params["unused"], strict=True)
        )
        spoilt = bad[ours] | worse[theirs]
        kind[theirs[spoilt]], place[theirs[spoilt]] = DONOR, theirs[spoilt]
        kind[theirs[bad[ours] & worse[theirs]]] = -1
        alone = (kind == DONOR) & worse & ~np.isin(np.arange(len(kind)), theirs)
        kind[alone] = -1
        ours, theirs = ours[~spoilt], theirs[~spoilt]
    fresh = np.flatnonzero(kind == DONOR)
    shared = Shared(model, donor, ours, theirs, place[fresh])
    made = _finished(job, method(job, shared) if len(fresh) else np.zeros((0, model.shape[1])), shared.fresh)
    place[fresh] = np.arange(len(fresh))
    wide = np.dtype(np.float64 if job.double else np.float32)
    made = made.astype(wide)
    width = model.shape[1]

    def combine(block: Block) -> Array:
        first, last = block.start // width, -(-(block.start + block.count) // width)
        found = np.zeros((last - first, width), wide)
        here, row = kind[first:last], place[first:last]
        found[here == MODEL] = model[row[here == MODEL]].astype(wide)
        found[here == DONOR] = made[row[here == DONOR]]
        begin = block.start - first * width
        return found.reshape(-1)[begin : begin + block.count]

    return combine


def _row_kinds(rows: RowMap) -> tuple[Array, Array]:
    """For each row of the output, the input that it is of (-1: none, zeros), and its number there."""
    import numpy as np

    sources = [pair[0] if pair else (-1, 0) for pair in rows.rows()]
    kind, place = np.array(sources, dtype=np.int64).reshape(-1, 2).T.copy()
    return kind, place


def _finished(job: Job, made: Array, rows: Array) -> Array:
    """New rows with noise, then scaled."""
    if job.params.get("noise"):
        made = made + job.params["noise"] * normals(job.params, _NOISE, rows, made.shape[1])
    scale = job.params.get("scale")
    return made if scale is None else made * scale
