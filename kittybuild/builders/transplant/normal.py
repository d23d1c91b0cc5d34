"""Normally distributed numbers from a counter: seed, tensor, stream, row and column decide each, and nothing else.

Box and Muller's method (1958) over the integers of builders/random.py: element n of a stream is
sqrt(-2 ln u) sin(2 pi v), of the integers 2n and 2n + 1, each plus 2**31 + 1/2, over 2**32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kittybuild.builders.elementary import logarithm, sine
from kittybuild.builders.random import Draws

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def normals(params: Mapping[str, Any], stream: int, rows: Array, width: int) -> Array:
    """The numbers of these rows of a table: [rows, width] in float64. Of params count `seed` and `tensor`."""
    import numpy as np

    draws = Draws(params["seed"], params["tensor"], stream)
    found = np.empty((len(rows), width))
    for number, row in enumerate(rows.tolist()):
        even = (draws.integers(2 * row * width, 2 * width).astype(np.float64) + (2.0**31 + 0.5)) / 2.0**32
        length = np.sqrt(-2.0 * logarithm(even[0::2].copy()))
        found[number] = length * sine(2.0 * math.pi * even[1::2])
    return found
