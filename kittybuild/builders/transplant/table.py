"""What all methods have in common: which rows are copied, which are made, and of what; then the table, block by block.

A method sees only tables and numbers of rows, and makes new rows in float64, a group of them at a time. Groups are the
same for every size of blocks, so that not even the order of additions in a product of matrices depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.normals import normals
from kittybuild.builders.random import Draws
from kittybuild.builders.transplant.undertrained import undertrained
from kittybuild.model.rows import RowMap

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

MODEL, DONOR = 0, 1
AT_ONCE = 1 << 24
"""Numbers that a method holds at once, beside tables."""
_GROUP = 256
_PART = 1 << 21
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

    def of_donor(self, rows: Array, dtype: Any = "float64") -> Array:
        """Rows of the donor's table in a wider dtype."""
        assert self.donor is not None  # whoever asks for it lists it among the inputs
        return self.donor[rows].astype(dtype)

    def of_model(self, rows: Array) -> Array:
        """Rows of the model's table in float64."""
        return self.model[rows].astype("float64")

    def parts(self) -> Iterator[slice]:
        """The shared tokens in order, some at a time: what is held of them in float64 takes little memory."""
        assert self.donor is not None
        several = max(1, _PART // max(self.donor.shape[1], self.model.shape[1]))
        return (slice(start, start + several) for start in range(0, len(self.theirs), several))

    def combined(self, chosen: Array, weights: Array) -> Array:
        """For each row, the sum of weights[row, n] times the model's row of the shared token chosen[row, n], added in
        order of n: [rows, width] in float64."""
        import numpy as np

        total = np.zeros((len(chosen), self.model.shape[1]))
        for n in range(chosen.shape[1]):
            total += weights[:, n, None] * self.of_model(self.ours[chosen[:, n]])
        return total


Make = Callable[["Array"], "Array"]
"""Makes the rows of these numbers of the donor's table: [rows, width of the model] in float64."""
Method = Callable[[Job, Shared], Make]


def builder(name: str, method: Method, *, version: int = 1, machine: bool = False) -> Builder:
    """The builder of a method. Inputs: the model's table, then the donor's if it counts, both [rows, width].

    Params: `rows`, a RowMap over (0) the model's rows and (1) rows to be made, by their number in the donor's table;
    `anchors`, a RowMap of pairs, one of each table; `scale` and `noise` (with `seed` and `tensor`) of new rows, if they
    have any; `unused`, two RowMaps of rows that nobody trained, where such tokens shall not count; and the method's.
    """

    def prepare(job: Job) -> Combine:
        return _table(job, method)

    return Builder(f"transplant_{name}", version, prepare, streamed=0, whole=0, rows=True, machine=machine)


def _table(job: Job, method: Method) -> Combine:
    import numpy as np

    kind, place, shared = _read(job)
    wide = np.dtype(np.float64 if job.double else np.float32)
    width = shared.model.shape[1]
    fresh = np.flatnonzero(kind == DONOR)
    make = method(job, shared) if len(fresh) else None

    @lru_cache(maxsize=1)  # blocks come in order, and end within groups
    def group(number: int) -> Array:
        assert make is not None
        rows = shared.fresh[number * _GROUP : (number + 1) * _GROUP]
        return _finished(job, make(rows), rows).astype(wide)

    def combine(block: Block) -> Array:
        first, last = block.start // width, (block.start + block.count) // width
        here, row = kind[first:last], place[first:last]
        found = np.zeros((last - first, width), wide)
        found[here == MODEL] = shared.model[row[here == MODEL]].astype(wide)
        start, stop = np.searchsorted(fresh, (first, last)).tolist()
        if start < stop:
            begin = start // _GROUP
            made = np.concatenate([group(number) for number in range(begin, -(-stop // _GROUP))])
            found[here == DONOR] = made[start - begin * _GROUP : stop - begin * _GROUP]
        return found.reshape(-1)

    return combine


def _read(job: Job) -> tuple[Array, Array, Shared]:
    """For each row of the output, the input that it is of (-1: none, zeros) and its number there; and what is known."""
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
    return kind, place, Shared(model, donor, ours, theirs, place[kind == DONOR])


def _row_kinds(rows: RowMap) -> tuple[Array, Array]:
    """For each row of the output, the input that it is of (-1: none, zeros), and its number there."""
    import numpy as np

    sources = [pair[0] if pair else (-1, 0) for pair in rows.rows()]
    kind, place = np.array(sources, dtype=np.int64).reshape(-1, 2).T.copy()
    return kind, place


def _finished(job: Job, made: Array, rows: Array) -> Array:
    """New rows with noise, then scaled."""
    if job.params.get("noise"):
        made = made + job.params["noise"] * drawn(job, _NOISE, rows, made.shape[1])
    scale = job.params.get("scale")
    return made if scale is None else made * scale


def drawn(job: Job, stream: int, rows: Array, width: int) -> Array:
    """Normally distributed numbers of these rows of a table: [rows, width] in float64. Seed, tensor, stream, row and
    column decide each."""
    import numpy as np

    draws = Draws(job.params["seed"], job.params["tensor"], stream)
    found = np.empty((len(rows), width))
    for number, row in enumerate(rows.tolist()):
        found[number] = normals(draws, row * width, width)
    return found
