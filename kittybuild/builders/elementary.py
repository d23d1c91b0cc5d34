"""Transcendental functions of many float64 numbers by single IEEE operations: the same bits on every CPU.

The argument is reduced without loss, then a Taylor series ends below the last place. (numpy's own functions differ from
CPU to CPU; mpmath takes a hundred microseconds a number, which suits scalars.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

_LN2 = float.fromhex("0x1.62e42fefa3800p-1"), float.fromhex("0x1.ef35793c76730p-45")
_PI = (
    float.fromhex("0x1.921fb54400000p+1"),
    float.fromhex("0x1.0b4611a400000p-33"),
    float.fromhex("0x1.13198a2e03707p-64"),
)
"""In parts: the number of times that they are taken off an argument, times any but the last, is exact."""
_LOG2_E = 1.4426950408889634
_HALF_LN2 = 0.34657359027997264
_ROOT_HALF = math.sqrt(0.5)
_ROOT_HALF_BITS = 0x3FE6_A09E_667F_3BCD

# Highest power first.
_EXP = tuple(1 / math.factorial(n) for n in range(13, -1, -1))
_LOG = tuple(2 / (2 * n + 1) for n in range(10, 0, -1))
_SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(11, 0, -1))
_ATAN = tuple((-1) ** n / (2 * n + 1) for n in range(11, 0, -1))


def exponential(x: Array) -> Array:
    """e to the power of each number, in place, within two units of the last place. Beyond -708 and 709 it stands."""
    import numpy as np

    if x.size and x.min() > -_HALF_LN2 and x.max() < _HALF_LN2:  # what follows would change nothing but the time
        x[...] = _series(_EXP, x)
        return x
    np.clip(x, -708.0, 709.0, out=x)
    times = x * _LOG2_E
    np.rint(times, out=times)
    for part in _LN2:
        x -= times * part
    power = times.astype(np.int64)
    power += 1023
    power <<= 52
    return np.multiply(_series(_EXP, x), power.view(np.float64), out=x)


def logarithm(x: Array) -> Array:
    """The natural logarithm of each positive normal number, in place, within a unit of the last place.

    NaN and infinity give NaN; what it makes of zero, of the smallest and of negative numbers is undefined.
    """
    import numpy as np

    if x.size and x.min() >= _ROOT_HALF and x.max() < 2 * _ROOT_HALF:  # times would be zero
        x -= 1.0
        less = _less(x)
        less -= x
        return np.subtract(0.0, less, out=x)
    spoilt = x - x
    bits = x.view(np.int64)
    powers = bits - _ROOT_HALF_BITS
    powers >>= 52
    times = powers.astype(np.float64)
    powers <<= 52
    bits -= powers
    x -= 1.0  # exact; x is now 2**-times the argument, less 1
    less = _less(x)
    less -= times * _LN2[1]
    less -= x
    times *= _LN2[0]
    np.subtract(times, less, out=x)
    x += spoilt
    return x


def _less(x: Array) -> Array:
    """What log(1 + x) is less than x: the ratio x / (2 + x) times (x - series)."""
    import numpy as np

    ratio = x + 2.0
    np.divide(x, ratio, out=ratio)
    square = ratio * ratio
    less = _series(_LOG, square)
    less *= square
    np.subtract(x, less, out=less)
    less *= ratio
    return less


def sine(x: Array) -> Array:
    """The sine of each number of up to a million, in place, within 2**-52 and three units of the last place."""
    import numpy as np

    times = x / math.pi
    np.rint(times, out=times)
    for part in _PI:
        x -= times * part
    square = x * x
    more = _series(_SIN, square)
    more *= square
    more *= x
    x += more
    odd = times.astype(np.int64)
    odd <<= 63
    bits = x.view(np.int64)
    bits ^= odd  # an odd multiple of π off
    return x


def arc_cosine(x: Array) -> Array:
    """The angle from 0 to π of each cosine from -1 to 1, within eight units of the last place."""
    import numpy as np

    size = np.abs(x)
    tangent = np.sqrt((1.0 - size) / (1.0 + size))  # of half the angle
    for _ in range(2):  # of a quarter, of an eighth
        tangent /= np.sqrt(tangent * tangent + 1.0) + 1.0
    square = tangent * tangent
    angle: Array = (tangent + _series(_ATAN, square) * square * tangent) * 8.0
    return np.where(x >= 0, angle, math.pi - angle)


def _series(coefficients: Sequence[float], x: Array) -> Array:
    """The polynomial with these coefficients, highest power first (Horner's scheme)."""
    result = x * coefficients[0]
    result += coefficients[1]
    for coefficient in coefficients[2:]:
        result *= x
        result += coefficient
    return result
