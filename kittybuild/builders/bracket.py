"""Thresholds in one pass: a sample says between which two values each lies, the pass counts and keeps what is there.

The sample decides only how long it takes: what lies above a bracket is counted, what lies inside is held, so a
threshold that is found is exact, and one that lies outside, or among too many, is not found here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kittybuild.builders.base import BLOCK
from kittybuild.builders.threshold import Part, Scan, Threshold, as_bits

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

PIECES = 128
PIECE = 16_384
"""Elements of a piece: some rows of a matrix, since rows differ more from each other than columns do."""
THINNED = 7
"""Of a piece, each so many-th element is enough; an odd number, so that no row gives the columns of another."""
STEP = (math.sqrt(5) - 1) / 2
"""Multiples of the golden ratio are spread evenly, but never in step with the rows of a matrix."""
DEVIATIONS = 3
"""Half the width of a bracket, in standard deviations of what the pieces say of its place."""


def bracketed(
    scan: Scan, part: Part, numel: int, wanted: Mapping[int, tuple[int, int]], in_memory: int
) -> dict[int, Threshold]:
    """Those of the wanted thresholds, each an (input, count), that one pass finds; `in_memory`: see `largest`."""
    inputs = [input_ for input_, _ in wanted.values()]
    samples = _samples(part, numel, sorted(set(inputs)))
    brackets = {}
    for n, (input_, count) in wanted.items():
        room = in_memory // inputs.count(input_)
        brackets[n] = _Bracket(input_, count, *_around(samples[input_], count / numel, room / numel), room)
    for start, magnitudes in scan(samples.keys()) if samples else ():
        for bracket in brackets.values():
            bracket.look(start, as_bits(magnitudes[bracket.input]))
    found = {n: bracket.threshold(part) for n, bracket in brackets.items()}
    return {n: threshold for n, threshold in found.items() if threshold is not None}


def _samples(part: Part, numel: int, inputs: Sequence[int]) -> dict[int, Array]:
    """Pieces of each input, a row each, taken evenly from all of it."""
    import numpy as np

    pieces = max(PIECES, numel >> 19)
    length = max(1, min(PIECE, numel // (8 * pieces)))
    rows: dict[int, list[Array]] = {input_: [] for input_ in inputs}
    for start in sorted(int(n * STEP % 1 * (numel - length + 1)) for n in range(pieces)):
        for input_, magnitudes in part(inputs, start, length).items():
            rows[input_].append(as_bits(magnitudes)[::THINNED].copy())
    return {input_: np.stack(found) for input_, found in rows.items()}


def _around(sample: Array, share: float, room: float) -> tuple[int, int]:
    """Two values between which the least of the `share` largest magnitudes will be, and not much more than `room`."""
    import numpy as np

    size = sample.size
    place = size - 1 - int(share * size)
    halves = np.partition(sample, place, axis=None)
    shares = [np.count_nonzero(large, axis=1) for large in (sample > halves[place], sample >= halves[place])]
    deviation = max(float(share.std()) for share in shares) / sample.shape[1] / math.sqrt(len(sample))
    aside = min(DEVIATIONS * deviation, 0.4 * room)
    low, high = place - int(aside * size) - DEVIATIONS, place + int(aside * size) + DEVIATIONS
    least = 0 if low < 0 else int(np.partition(halves[:place], low)[low])
    most = np.iinfo(sample.dtype).max if high >= size else np.partition(halves[place:], high - place)[high - place]
    return least, int(most)


@dataclass(slots=True)
class _Seen:
    """What of a block lies at the two ends of a bracket (how many), and inside."""

    start: int
    length: int
    at_high: int
    at_low: int
    inside: Array

    def equal(self, value: int, bracket: _Bracket) -> int:
        """How many are equal to a value of the bracket."""
        import numpy as np

        ends = {bracket.low: self.at_low, bracket.high: self.at_high}
        return ends[value] if value in ends else int(np.count_nonzero(self.inside == value))


@dataclass(slots=True)
class _Bracket:
    """One threshold, that of the `count` largest of an input, sought between two values; `room`: how many it may hold.

    The ends themselves are only counted: in short dtypes a great part of a tensor may be equal to one of them.
    """

    input: int
    count: int
    low: int
    high: int
    room: int
    above: int = 0
    held: int = 0
    seen: list[_Seen] = field(default_factory=list)

    def look(self, start: int, bits: Array) -> None:
        """Take in a block."""
        import numpy as np

        if self.held > self.room:
            return
        above = bits > self.high
        self.above += int(np.count_nonzero(above))
        if self.low == self.high:
            near = bits[:0]
            at_high = at_low = int(np.count_nonzero(bits == self.high))
        else:
            near = bits.compress(above ^ (bits >= self.low))
            at_high, at_low = (int(np.count_nonzero(near == end)) for end in (self.high, self.low))
            if at_high or at_low:
                near = near.compress((near > self.low) & (near < self.high))
        self.seen.append(_Seen(start, len(bits), at_high, at_low, near))
        self.held += len(near)
        if self.held > self.room:
            self.seen.clear()

    def threshold(self, part: Part) -> Threshold | None:
        """The threshold, after all blocks; None where it is not within the bracket, or there was no room."""
        value, ties = self._value()
        if value is None:
            return None
        equal = [seen.equal(value, self) for seen in self.seen]
        if ties == sum(equal):
            return Threshold(value, self.seen[-1].start + self.seen[-1].length)
        for seen, count in zip(self.seen, equal, strict=True):
            if ties <= count:
                return Threshold(value, self._place(part, seen, value, ties))
            ties -= count
        raise AssertionError  # there are more of them than ties

    def _value(self) -> tuple[int | None, int]:
        """The threshold's value, and how many of those equal to it are kept."""
        import numpy as np

        at_high = sum(seen.at_high for seen in self.seen)
        ties = self.count - self.above
        if self.held > self.room or ties <= 0:
            return None, 0
        if ties <= at_high:
            return self.high, ties
        ties -= at_high
        if ties <= self.held:
            inside = np.concatenate([seen.inside for seen in self.seen])
            value = int(np.partition(inside, self.held - ties)[self.held - ties])
            return value, ties - int(np.count_nonzero(inside > value))
        ties -= self.held
        if self.low < self.high and ties <= sum(seen.at_low for seen in self.seen):
            return self.low, ties
        return None, 0

    def _place(self, part: Part, seen: _Seen, value: int, ties: int) -> int:
        """Where in a block the last of so many that equal the value stands."""
        import numpy as np

        for start in range(seen.start, seen.start + seen.length, BLOCK):
            length = min(BLOCK, seen.start + seen.length - start)
            bits = as_bits(part((self.input,), start, length)[self.input])
            places = np.flatnonzero(bits == value)
            if ties <= len(places):
                return start + int(places[ties - 1])
            ties -= len(places)
        raise AssertionError  # the scan has seen them
