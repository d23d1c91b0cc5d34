"""Norms of streamed numbers, the same bits for every size of blocks.

Sums are the design's fixed tree: leaves, halved by float64 adds, their results added in order. A leaf is BLOCK
elements, or a row where blocks are rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Protocol

from kittybuild.builders.base import BLOCK
from kittybuild.builders.numerics import tree_sums

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

Order = Literal["l1", "l2", "linf"]


class Norm(Protocol):
    """A norm on its way."""

    def add(self, values: Array) -> None:
        """Take in the next elements, from the beginning of a leaf on; they stay as they are."""

    def value(self) -> float:
        """The norm of all that was taken in."""


def norm(order: Order, leaf: int = BLOCK) -> Norm:
    """A new norm: the sum of magnitudes (l1), the root of the sum of squares (l2), or the largest magnitude (linf)."""
    return _Largest() if order == "linf" else _Sum(leaf, squares=order == "l2")


class _Sum:
    """Magnitudes or squares, in float64. (Squares of float32 are exact, those of float64 rounded.)"""

    def __init__(self, leaf: int, *, squares: bool) -> None:
        self._leaf, self._squares, self._total = leaf, squares, 0.0

    def add(self, values: Array) -> None:
        """See Norm."""
        import numpy as np

        several = max(1, BLOCK // self._leaf) * self._leaf
        for start in range(0, len(values), several):
            part = values[start : start + several]
            wide = (np.square if self._squares else np.abs)(part, dtype=np.float64)
            for total in tree_sums(wide.reshape(-1, min(self._leaf, len(wide)))):
                self._total += total

    def value(self) -> float:
        """See Norm."""
        return math.sqrt(self._total) if self._squares else self._total


class _Largest:
    def __init__(self) -> None:
        self._most = 0.0

    def add(self, values: Array) -> None:
        """See Norm."""
        if len(values):
            most = float(abs(values).max())  # NaN, if there is one
            self._most = most if most > self._most or math.isnan(most) else self._most

    def value(self) -> float:
        """See Norm."""
        return self._most
