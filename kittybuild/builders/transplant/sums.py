"""Sums over the rows and columns of a table in float64: fixed trees, the same bits on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.numerics import tree_sums

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

LEAF = 1024
"""Rows of one leaf."""


def mean_row(table: Array) -> Array:
    """The mean of the rows of [rows, width] in float64: leaves of rows, each a tree, added in order."""
    import numpy as np

    total = np.zeros(table.shape[1])
    for start in range(0, len(table), LEAF):
        total += tree_sums(np.ascontiguousarray(table[start : start + LEAF].T, dtype=np.float64))
    return total / len(table)


def row_products(table: Array, other: Array | None = None) -> Array:
    """The dot product of each row with itself, or with the one row `other`: trees of float64."""
    import numpy as np

    found = np.empty(len(table))
    for start in range(0, len(table), LEAF):
        rows = table[start : start + LEAF].astype(np.float64)
        found[start : start + LEAF] = tree_sums(rows * (rows if other is None else other))
    return found
