"""A threshold over magnitudes: exactly so many of the largest of a tensor, among equals those of the lowest index.

Magnitudes are compared by their bits: for non-negative floats the order of the bits is the order of the numbers, and
NaN stands above all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

Scan = Callable[[Collection[int]], Iterable[tuple[int, Mapping[int, "Array"]]]]
"""Asked again and again for some inputs: (start, magnitudes by input) of all blocks, in order, each used at once."""

Part = Callable[[Collection[int], int, int], Mapping[int, "Array"]]
"""The magnitudes of some inputs from an element on, so many (at most a leaf); used at once."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """What is kept: magnitudes with bits above `bits`, and those equal to it up to the element `last`."""

    bits: int
    last: int

    def mask(self, magnitudes: Array, start: int) -> Array:
        """Which are kept, as booleans; `start` is the index of the first."""
        import numpy as np

        if self in (EVERYTHING, NOTHING):
            return np.full(len(magnitudes), self == EVERYTHING)
        bits, keep = as_bits(magnitudes), np.empty(len(magnitudes), dtype=np.bool_)
        cut = max(0, self.last + 1 - start)
        np.greater_equal(bits[:cut], self.bits, out=keep[:cut])
        np.greater(bits[cut:], self.bits, out=keep[cut:])
        return keep

    def trim(self, delta: Array, start: int) -> Array:
        """`delta` in place with all else zeroed; `start` is the index of its first element."""
        return delta if self == EVERYTHING else masked(delta, self.mask(abs(delta), start))


EVERYTHING = Threshold(0, 1 << 62)
NOTHING = Threshold(1 << 63, -1)


def kept(numel: int, density: float) -> int:
    """How many elements a density keeps: int(density * numel), at least one where both are positive."""
    if density <= 0 or numel == 0:
        return 0
    return min(numel, max(1, int(density * numel)))


def as_bits(floats: Array) -> Array:
    """The same memory as integers."""
    return floats.view(f"i{floats.itemsize}")


def masked(delta: Array, keep: Array) -> Array:
    """`delta` in place, zero where `keep` is false."""
    bits = as_bits(delta)
    bits *= keep  # by 0 or 1: a product of floats would make NaN out of infinity
    return delta
