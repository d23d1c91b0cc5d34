"""Tokens that nobody trained, as their rows tell: among the shortest, or pointing where unused rows do.

After Land and Bartolo, Fishing for Magikarp (2024), with the limits of mergekit-tokensurgeon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kittybuild.builders.transplant.sums import mean_row, row_products

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

SHARE = 0.01
LEAST_COSINE = 0.5


def undertrained(table: Array, unused: Sequence[int]) -> Array:
    """For each row of [rows, width], whether it is untrained: it is unused; or of the hundredth part with the smallest
    norms; or of the hundredth part with the largest cosines to the mean of unused rows, if that is at least a half."""
    import numpy as np

    found = np.zeros(len(table), bool)
    found[list(unused)] = True
    few = math.ceil(SHARE * len(table))
    norms = np.sqrt(row_products(table))
    found[np.argsort(norms, kind="stable")[:few]] = True
    if unused:
        mean = mean_row(table[list(unused)])
        length = math.sqrt(float(row_products(mean[None])[0]))
        cosines = row_products(table, mean) / np.maximum(norms * length, 1e-30)
        likest = np.argsort(-cosines, kind="stable")[:few]
        found[likest[cosines[likest] >= LEAST_COSINE]] = True
    return found
