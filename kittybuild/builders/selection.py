"""Exact selection of the largest magnitudes over blocks; among equals the lowest index wins.

Magnitudes are compared by their bits: for non-negative floats the order of the bits is the order of the numbers, and
NaN stands above all. Digits of 16 bits are counted, one a pass, until the elements that share the threshold's leading
digits are few enough to be selected in memory: small tensors need no such pass, large ones mostly one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Ints = NDArray[Any]

Scan = Callable[[Collection[int]], Iterable[tuple[int, Mapping[int, "Tensor"]]]]
"""Asked again and again for some inputs: (start, magnitudes by input) of all blocks, in order, each used at once."""

IN_MEMORY = 1 << 22
DIGIT = 16


@dataclass(frozen=True, slots=True)
class Threshold:
    """What is kept: magnitudes with bits above `bits`, and those equal to it up to the element `last`."""

    bits: int
    last: int

    def trim(self, delta: Tensor, start: int) -> Tensor:
        """`delta` in place with all else zeroed; `start` is the index of its first element."""
        if self == EVERYTHING:
            return delta
        if self == NOTHING:
            return delta.zero_()
        keep = _bits(delta.abs())
        cut = max(0, self.last + 1 - start)
        keep[:cut].ge_(self.bits)
        keep[cut:].gt_(self.bits)
        _bits(delta).mul_(keep)  # the bits by 0 or 1: a product of floats would make NaN out of infinity
        return delta


EVERYTHING = Threshold(0, 1 << 62)
NOTHING = Threshold(1 << 63, -1)


def kept(numel: int, density: float) -> int:
    """How many elements a density keeps: int(density * numel), at least one where both are positive."""
    if density <= 0 or numel == 0:
        return 0
    return min(numel, max(1, int(density * numel)))


def largest(
    scan: Scan, numel: int, counts: list[int], *, double: bool = False, in_memory: int = IN_MEMORY
) -> list[Threshold]:
    """For each input, the threshold that keeps exactly its count of the largest magnitudes.

    `double`: magnitudes are float64 instead of float32; `in_memory`: elements of one input that may be held at once.
    """
    top = 63 if double else 31  # without the sign
    searches = {i: _Search(count, numel, top, top) for i, count in enumerate(counts) if 0 < count < numel}
    while crowded := {i: search for i, search in searches.items() if search.among > in_memory and search.shift}:
        _count_digits(scan, crowded)
    if searches:
        for start, magnitudes in scan(searches.keys()):
            for i, search in searches.items():
                search.gather(start, _bits(magnitudes[i]).numpy())
    found = {i: search.threshold() for i, search in searches.items()}
    return [found.get(i, EVERYTHING if count else NOTHING) for i, count in enumerate(counts)]


@dataclass(slots=True)
class _Search:
    """One threshold on its way: of the `among` elements that share its bits above `shift` (`prefix`), keep `ties`."""

    ties: int
    among: int
    top: int
    shift: int
    prefix: int = 0
    last: int = -1
    bits: list[Ints] = field(default_factory=list)
    places: list[Ints] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bits of the next digit."""
        return min(DIGIT, self.shift)

    def digits(self, bits: Tensor) -> Tensor:
        """The next digit of each element that shares the prefix."""
        import torch

        if self.shift == self.top:
            return bits >> (self.top - self.size)
        bits = torch.from_numpy(bits.numpy()[(bits >> self.shift).numpy() == self.prefix])
        return (bits >> (self.shift - self.size)) & ((1 << self.size) - 1)

    def narrow(self, counts: Ints) -> None:
        """Take the digit at which the elements to be kept run out; `counts`: how many have each digit."""
        import numpy as np

        above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(above, self.ties))
        digit = len(counts) - 1 - place
        self.among = int(counts[digit])
        self.ties -= int(above[place]) - self.among
        self.prefix = self.prefix << self.size | digit
        self.shift -= self.size

    def gather(self, start: int, bits: Ints) -> None:
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


def _bits(magnitudes: Tensor) -> Tensor:
    import torch

    return magnitudes.view(torch.int64 if magnitudes.dtype == torch.float64 else torch.int32)


def _count_digits(scan: Scan, searches: Mapping[int, _Search]) -> None:
    """One pass: the next digit of each threshold."""
    import torch

    totals = {i: torch.zeros(1 << DIGIT, dtype=torch.int64) for i in searches}
    for _, magnitudes in scan(searches.keys()):
        for i, search in searches.items():
            totals[i] += torch.bincount(search.digits(_bits(magnitudes[i])), minlength=1 << DIGIT)
    for i, search in searches.items():
        search.narrow(totals[i].numpy())
