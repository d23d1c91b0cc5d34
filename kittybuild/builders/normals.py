"""Standard normal numbers from a counter, by single IEEE operations: element n depends on its draws alone.

Box and Muller's method (1958) over the integers of builders/random.py: element n is sqrt(-2 ln u) sin(2 pi v), u and v
being the integers 2n and 2n + 1, each plus 2**31 + 1/2, over 2**32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kittybuild.builders.elementary import logarithm, sine
from kittybuild.builders.random import Draws

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def normals(draws: Draws, start: int, count: int) -> Array:
    """The elements from `start` on, float64."""
    import numpy as np

    even = uniforms(draws, 2 * start, 2 * count)
    length = logarithm(even[0::2].copy())
    length *= -2.0
    np.sqrt(length, out=length)
    length *= sine(2.0 * math.pi * even[1::2])
    return length


def uniforms(draws: Draws, start: int, count: int) -> Array:
    """Numbers between 0 and 1, neither of which they are: float64."""
    import numpy as np

    found = draws.integers(start, count).astype(np.float64)
    found += 2.0**31 + 0.5
    found /= 2.0**32
    return found
