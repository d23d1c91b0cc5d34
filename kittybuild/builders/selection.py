"""Exact selection of the largest magnitudes over blocks; among equals the lowest index wins.

Magnitudes are compared by their bits: for non-negative floats the order of the bits is the order of the numbers, and
NaN stands above all. Small tensors are selected in memory, large ones by counting digits, 16 bits a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Scan = Callable[[], Iterator[tuple[int, "list[Tensor]"]]]
"""Asked again and again: (start, magnitudes of each input) of all blocks, in order."""

IN_MEMORY = 1 << 22
DIGIT = 16


@dataclass(frozen=True, slots=True)
class Threshold:
    """What is kept: magnitudes with bits above `bits`, and those equal to it up to the element `last`."""

    bits: int
    last: int

    def trim(self, delta: Tensor, start: int) -> Tensor:
        """`delta` in place with all else zeroed; `start` is the index of its first element."""
        if self.bits < 0:
            return delta
        found = _bits(delta.abs())
        keep = found > self.bits
        if self.last >= start:
            equal = found == self.bits
            equal[max(0, self.last + 1 - start) :] = False
            keep |= equal
        return delta.masked_fill_(~keep, 0.0)


EVERYTHING = Threshold(-1, -1)
NOTHING = Threshold((1 << 63) - 1, -1)


def kept(numel: int, density: float) -> int:
    """How many elements a density keeps: int(density * numel), at least one where both are positive."""
    if density <= 0 or numel == 0:
        return 0
    return min(numel, max(1, int(density * numel)))


def largest(scan: Scan, numel: int, counts: list[int]) -> list[Threshold]:
    """For each input, the threshold that keeps exactly its count of the largest magnitudes."""
    wanted = {index: count for index, count in enumerate(counts) if 0 < count < numel}
    found = (_in_memory if numel <= IN_MEMORY else _by_digits)(scan, numel, wanted) if wanted else {}
    return [found.get(i, EVERYTHING if count else NOTHING) for i, count in enumerate(counts)]


def _bits(magnitudes: Tensor) -> Tensor:
    import torch

    return magnitudes.view(torch.int64 if magnitudes.dtype == torch.float64 else torch.int32)


def _in_memory(scan: Scan, numel: int, wanted: dict[int, int]) -> dict[int, Threshold]:
    import torch

    parts: dict[int, list[Tensor]] = {index: [] for index in wanted}
    for _, magnitudes in scan():
        for index, collected in parts.items():
            collected.append(magnitudes[index])
    found = {}
    for index, count in wanted.items():
        bits = _bits(torch.cat(parts.pop(index)))
        value = int(bits.kthvalue(numel - count + 1).values)
        ties = count - int((bits > value).sum())
        found[index] = Threshold(value, int((bits == value).nonzero()[ties - 1]))
    return found


def _by_digits(scan: Scan, numel: int, wanted: dict[int, int]) -> dict[int, Threshold]:
    prefix = dict.fromkeys(wanted, 0)
    ties = dict(wanted)  # how many are still to be kept among those that share the prefix
    width = 0
    for _, magnitudes in scan():
        width = 8 * magnitudes[0].element_size()
        break
    for shift in range(width - DIGIT, -1, -DIGIT):
        for index, counts in _digit_counts(scan, prefix, shift).items():
            for digit in range(len(counts) - 1, -1, -1):
                if ties[index] <= counts[digit]:
                    prefix[index] = prefix[index] << DIGIT | digit
                    break
                ties[index] -= counts[digit]
    return {index: Threshold(prefix[index], last) for index, last in _places(scan, prefix, ties).items()}


def _digit_counts(scan: Scan, prefix: dict[int, int], shift: int) -> dict[int, list[int]]:
    """How often each 16-bit digit at `shift` occurs, among the elements whose higher bits are `prefix`."""
    import torch

    totals = {index: torch.zeros(1 << DIGIT, dtype=torch.int64) for index in prefix}
    for _, magnitudes in scan():
        for index, higher in prefix.items():
            bits = _bits(magnitudes[index]) >> shift
            digits = bits[(bits >> DIGIT) == higher] & ((1 << DIGIT) - 1)
            totals[index] += torch.bincount(digits, minlength=1 << DIGIT)
    return {index: total.tolist() for index, total in totals.items()}


def _places(scan: Scan, values: dict[int, int], ties: dict[int, int]) -> dict[int, int]:
    """The index of the last element kept among those equal to the threshold."""
    left, places = dict(ties), {}
    for start, magnitudes in scan():
        for index in list(left):
            equal = (_bits(magnitudes[index]) == values[index]).nonzero()
            if left[index] <= len(equal):
                places[index] = start + int(equal[left.pop(index) - 1])
            else:
                left[index] -= len(equal)
        if not left:
            break
    return places
