"""Thresholds in passes of bounded memory, for any tensor: digits of 16 bits are counted, one a pass.

The search ends when the elements that share the threshold's leading digits are few enough to be selected in memory:
small tensors need no counting, large ones mostly one such pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kittybuild.builders.threshold import Scan, Threshold, as_bits

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

DIGIT = 16


def by_digits(
    scan: Scan, numel: int, wanted: Mapping[int, tuple[int, int]], double: bool, in_memory: int
) -> dict[int, Threshold]:
    """The threshold of each wanted (input, count): two or three passes where more than `in_memory` elements are equal
    in their first digits, else one.
    """
    top = 63 if double else 31  # without the sign
    searches = {n: _Search(input_, count, numel, top, top) for n, (input_, count) in wanted.items()}
    among = [input_ for input_, _ in wanted.values()]
    room = in_memory // max(map(among.count, among), default=1)
    while crowded := [search for search in searches.values() if search.among > room and search.shift]:
        _count_digits(scan, crowded)
    if searches:
        for start, magnitudes in scan({search.input for search in searches.values()}):
            for search in searches.values():
                search.gather(start, as_bits(magnitudes[search.input]))
    return {n: search.threshold() for n, search in searches.items()}


@dataclass(slots=True)
class _Search:
    """One threshold on its way: of the `among` elements that share its bits above `shift` (`prefix`), keep `ties`."""

    input: int
    ties: int
    among: int
    top: int
    shift: int
    prefix: int = 0
    last: int = -1
    bits: list[Array] = field(default_factory=list)
    places: list[Array] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bits of the next digit."""
        return min(DIGIT, self.shift)

    def digits(self, bits: Array) -> Array:
        """The next digit of each element that shares the prefix."""
        if self.shift == self.top:
            return bits >> (self.top - self.size)
        bits = bits.compress(bits >> self.shift == self.prefix)
        return (bits >> (self.shift - self.size)) & ((1 << self.size) - 1)

    def narrow(self, counts: Array) -> None:
        """Take the digit at which the elements to be kept run out; `counts`: how many have each digit."""
        import numpy as np

        above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(above, self.ties))
        digit = len(counts) - 1 - place
        self.among = int(counts[digit])
        self.ties -= int(above[place]) - self.among
        self.prefix = self.prefix << self.size | digit
        self.shift -= self.size

    def gather(self, start: int, bits: Array) -> None:
        """Collect what shares the prefix; where that is all bits, only look for the last that is kept."""
        import numpy as np

        if self.shift == self.top:
            self.bits.append(bits.copy())
            return
        sharing = np.flatnonzero(bits >> self.shift == self.prefix)
        if self.shift:
            self.bits.append(bits[sharing])
            self.places.append(sharing + start)
        elif self.ties and len(sharing):
            count = min(self.ties, len(sharing))
            self.ties -= count
            self.last = start + int(sharing[count - 1])

    def threshold(self) -> Threshold:
        """The threshold, after everything has been gathered."""
        import numpy as np

        if not self.shift:
            return Threshold(self.prefix, self.last)
        bits = np.concatenate(self.bits)
        self.bits.clear()
        place = len(bits) - self.ties
        value = np.partition(bits, place)[place]
        last = np.flatnonzero(bits == value)[self.ties - np.count_nonzero(bits > value) - 1]
        return Threshold(int(value), int(np.concatenate(self.places)[last] if self.places else last))


def _count_digits(scan: Scan, searches: Sequence[_Search]) -> None:
    """One pass: the next digit of each threshold."""
    import numpy as np

    totals = [np.zeros(1 << DIGIT, dtype=np.int64) for _ in searches]
    for _, magnitudes in scan({search.input for search in searches}):
        for total, search in zip(totals, searches, strict=True):
            total += np.bincount(search.digits(as_bits(magnitudes[search.input])), minlength=1 << DIGIT)
    for total, search in zip(totals, searches, strict=True):
        search.narrow(total)
