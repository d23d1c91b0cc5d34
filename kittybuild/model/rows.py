"""Where the rows of a new table come from: runs of rows that are copied, averaged, zero, or the mean of those before.

One value has one text: runs are as long as they can be, so that equal maps have equal keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Place = tuple[int, int]
"""An input, by its number, and a row of it."""
Sources = tuple[Place, ...]
"""What a row is made of: nothing (zeros), one row (its copy), or several (their average)."""

_RUN = re.compile(r"([1-9][0-9]*):(zero|mean|[0-9]+\.[0-9]+(?:\+[0-9]+\.[0-9]+)*)")


@dataclass(frozen=True, slots=True)
class Run:
    """`count` rows: the first is made of `sources`, the next of the rows that follow them, and so on."""

    count: int
    sources: Sources


@dataclass(frozen=True, slots=True)
class RowMap:
    """The rows of a table, in order; then `means` more, each the mean of all rows before the first of them."""

    runs: tuple[Run, ...]
    means: int = 0

    @classmethod
    def of(cls, rows: Iterable[Sources], means: int = 0) -> RowMap:
        """The map of these rows, one after the other."""
        runs: list[Run] = []
        first: Sources = ()
        following: Sources = ()
        count = 0
        for sources in rows:
            if count and sources == following:
                count += 1
            else:
                runs += [Run(count, first)] if count else []
                first, count = sources, 1
            following = tuple([(number, row + 1) for number, row in sources])
        return cls((*runs, Run(count, first)) if count else (), means)

    @property
    def count(self) -> int:
        """How many rows."""
        return sum(run.count for run in self.runs) + self.means

    def rows(self) -> Iterator[Sources]:
        """What each row is made of, one after the other, without the means."""
        for run in self.runs:
            for step in range(run.count):
                yield tuple((number, row + step) for number, row in run.sources)

    def inputs(self) -> tuple[int, ...]:
        """The numbers of the inputs that are used, in order."""
        return tuple(sorted({number for run in self.runs for number, _ in run.sources}))

    def renumbered(self, inputs: tuple[int, ...]) -> RowMap:
        """The same map where the input `inputs[n]` is called n."""
        names = {number: place for place, number in enumerate(inputs)}
        runs = tuple(Run(run.count, tuple((names[n], row) for n, row in run.sources)) for run in self.runs)
        return RowMap(runs, self.means)

    def is_whole(self, number: int, rows: int) -> bool:
        """Whether the table is the input `number` of so many rows, as it is."""
        return not self.means and self.runs == ((Run(rows, ((number, 0),)),) if rows else ())

    def __str__(self) -> str:
        """`32000:0.0 1:1.32000 2:0.5+1.7 3:zero 8:mean`: count, then input and first row of each source."""
        runs = [f"{run.count}:{'+'.join(f'{n}.{row}' for n, row in run.sources) or 'zero'}" for run in self.runs]
        return " ".join([*runs, f"{self.means}:mean"] if self.means else runs)

    @classmethod
    def parse(cls, text: str) -> RowMap:
        """The inverse of `str`; raises ValueError for anything else."""
        runs: list[Run] = []
        means = 0
        for word in text.split(" ") if text else ():
            match = _RUN.fullmatch(word)
            if match is None or means:
                raise ValueError(f"not a map of rows: {word[:40]!r}")
            if match[2] == "mean":
                means = int(match[1])
            else:
                places = [] if match[2] == "zero" else [place.split(".") for place in match[2].split("+")]
                runs.append(Run(int(match[1]), tuple((int(number), int(row)) for number, row in places)))
        return cls(tuple(runs), means)
