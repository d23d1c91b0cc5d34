"""Portable arithmetic (numerics class kitty-1): the same bits on every CPU, for every block size and thread count.

- Sums: each leaf of BLOCK elements is halved by element-wise float64 adds; leaf results are added in order.
- Selection: exact counting; among equals the lowest index wins.
- Scalars: correctly rounded at 120 bits by mpmath, then rounded once to float64.
- Matrix products: operands are cut into slices so short that float64 sums of their products are exact in any order
  (error-free splitting: Ozaki, Ogita, Oishi, Rump, Numerical Algorithms 59, 2012).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import BLOCK

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

_BITS = 120
_MPMATH = threading.Lock()
"""mpmath keeps constants in variables that two threads may not fill at once."""
_AT_ONCE = 3
"""Products of pairs that are summed together: more take more memory, fewer more steps."""
_SMALLEST = -900
"""Exponent at which a row of a matrix counts as zero: far below float32, far above where float64 scales end."""


def tree_sums(rows: Array) -> list[float]:
    """The sum of each row of a 2-D float64 array, as if filled with zeros to a power of two; overwrites it."""
    width = rows.shape[1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        rows[:, : width - half] += rows[:, half:width]
        width = half
    return rows[:, 0].tolist()  # type: ignore[no-any-return]


def dots(arrays: Sequence[Array], pairs: Sequence[tuple[int, int]]) -> Iterator[list[float]]:
    """For each leaf of 1-D arrays that start at a leaf boundary, the dot products of these pairs of them.

    The products are exact for float32 arrays, and rounded once for float64.
    """
    for start in range(0, len(arrays[0]), BLOCK):
        leaves = [array[start : start + BLOCK] for array in arrays]
        yield [total for products in _products(leaves, pairs) for total in tree_sums(products)]


def row_dots(arrays: Sequence[Array], pairs: Sequence[tuple[int, int]], width: int) -> Array:
    """The dot products of these pairs of 1-D arrays of whole rows: a row for each pair, a column for each of theirs.

    In float64; each row of the arrays is one tree of its `width` elements.
    """
    import numpy as np

    found = np.empty((len(pairs), len(arrays[0]) // width))
    several = max(1, BLOCK // width)
    for first in range(0, found.shape[1], several):
        leaves = [array[first * width : (first + several) * width] for array in arrays]
        sums = [total for products in _products(leaves, pairs) for total in tree_sums(products.reshape(-1, width))]
        found[:, first : first + several] = np.reshape(sums, (len(pairs), -1))
    return found


def _products(leaves: Sequence[Array], pairs: Sequence[tuple[int, int]]) -> Iterator[Array]:
    """The element-wise products of these pairs in float64, three at a time in one place."""
    import numpy as np

    place = np.empty((min(_AT_ONCE, len(pairs)), len(leaves[0])))
    wide: dict[int, Array] = {}
    for few in range(0, len(pairs), _AT_ONCE):
        several = pairs[few : few + _AT_ONCE]
        for row, pair in zip(place, several, strict=False):
            wide = {index: leaf for index, leaf in wide.items() if index in pair}
            wide |= {index: leaves[index].astype(np.float64, copy=False) for index in set(pair) - wide.keys()}
            np.multiply(wide[pair[0]], wide[pair[1]], out=row)
        yield place[: len(several)]


@contextmanager
def reals() -> Iterator[Any]:
    """mpmath with numbers of 120 bits, for longer calculations with scalars: a context of our own, as that of
    mpmath.mp is shared with other threads; one thread at a time.
    """
    import mpmath

    with _MPMATH:
        context = mpmath.mp.clone()
        context.prec = _BITS
        yield context


def arc_cosine_weights(cosine: float, t: float) -> tuple[float, float]:
    """sin((1-t)θ)/sin θ and sin(tθ)/sin θ for θ = arccos(cosine), |cosine| < 1, each rounded once to float64.

    (Outside 0 <= t <= 1 a sine may be so close to zero that the last bits of the float64 are not the nearest.)
    """
    # libmp's functions take their precision; that of the context mpmath.mp would be shared with other threads.
    from mpmath.libmp import fone, from_float, mpf_acos, mpf_div, mpf_mul, mpf_sin, mpf_sub, round_nearest, to_float

    def sine(part: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        return mpf_sin(mpf_mul(part, theta, _BITS, round_nearest), _BITS, round_nearest)  # type: ignore[no-any-return]

    with _MPMATH:
        theta = mpf_acos(from_float(cosine), _BITS, round_nearest)
        part = from_float(t)
        whole = mpf_sin(theta, _BITS, round_nearest)
        parts = mpf_sub(fone, part, _BITS, round_nearest), part
        near, far = (to_float(mpf_div(sine(p), whole, _BITS, round_nearest), rnd=round_nearest) for p in parts)
    return near, far


def exact_slices(matrix: Array, inner: int, *, rows: bool) -> list[Array]:
    """One or two float64 slices whose sum is `matrix`, each of few enough leading bits for exact products.

    Each row (column) of a slice holds integers below 2 ** bits times one power of two, where sums of `inner` products
    of such integers stay below 2 ** 53. Two slices hold at least 40 bits below the largest element of each row (column)
    for inner <= 8192.
    """
    import numpy as np

    bits = (53 - math.ceil(math.log2(max(inner, 2)))) // 2
    rest = matrix.astype(np.float64)
    _, exponent = np.frexp(np.abs(rest).max(axis=1 if rows else 0, keepdims=True))
    exponent = exponent.clip(_SMALLEST, 1024)  # an element that is not finite has any exponent
    slices = []
    for step in (1, 2):
        scale = _power_of_two(exponent - step * bits)
        part = rest / scale
        np.rint(part, out=part)
        part *= scale
        rest -= part
        if step == 1 or part.any():
            slices.append(part)
    return slices


def _power_of_two(exponent: Array) -> Array:
    """2 ** exponent as float64, by its bits; for exponents of normal numbers."""
    import numpy as np

    return ((exponent.astype(np.int64) + 1023) << 52).view(np.float64)


def exact_product(left: Sequence[Array], right: Sequence[Array]) -> Array:
    """The product of two sliced matrices in float64, by exact partial products. Its transpose has the same bits.

    The product of the two second slices lies below the rounding of the result and is left out. Zeros are positive.
    """
    total = left[0] @ right[0]
    lesser = [left[0] @ second for second in right[1:]] + [second @ right[0] for second in left[1:]]
    if len(lesser) == 2:  # added to each other first, so that neither side comes before the other
        lesser[0] += lesser.pop()
    for part in (*lesser, 0.0):  # what sign a zero has differs from one BLAS to another
        total += part
    return total
