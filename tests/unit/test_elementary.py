"""Elementary functions against mpmath, at random, at the ends of their ranges, and for every cut of the work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kittybuild.builders.elementary import arc_cosine, exponential, logarithm, sine
from tests.jobs import drawn

Array = NDArray[np.float64]

COUNT = 4000
SILENT = np.errstate(all="ignore")  # as while a builder runs
LEAST = math.ulp(0.0) * 2.0**52  # the least normal number
HUGE = 1.7976931348623157e308


def even(seed: str, low: float, high: float) -> Array:
    """Numbers of equal density (those of `drawn` are cubes)."""
    cubes = drawn(seed, COUNT, dtype=torch.float64).numpy()
    return np.cbrt(cubes) * ((high - low) / 2) + (high + low) / 2


def numbers(*values: float) -> Array:
    return np.array(values, np.float64)


def worst(function: Callable[[Array], Array], exact: Callable[[Any], Any], x: Array) -> tuple[float, float]:
    """The largest error of a function, in units of the last place and absolute."""
    units = absolute = 0.0
    with mpmath.workprec(1200):
        for number, found in zip(x.tolist(), function(x.copy()).tolist(), strict=True):
            wanted = exact(mpmath.mpf(number))
            error = float(abs(mpmath.mpf(found) - wanted))
            units, absolute = max(units, error / math.ulp(float(wanted))), max(absolute, error)
    return units, absolute


EXPONENTS = {
    "small": even("e1", -1, 1),
    "as in a softmax": even("e2", -40, 0),
    "all": even("e3", -708, 709),
    "none and almost none": np.concatenate([numbers(0.0, -0.0, 5e-324, -1e-300), even("e4", -1e-9, 1e-9)]),
    "ends and halves": numbers(-708, 709, *((n + 0.5) * math.log(2) for n in range(-1000, 1000))),
}
LOGARITHMS = {
    "around one": even("l1", 0.5, 2),
    "just beside one": 1 + even("l2", -1e-7, 1e-7),
    "every magnitude": numbers(*(m * 2.0**e for e in range(-1022, 1024) for m in (1.0, 1.4142, 1.4143, 1.9999999))),
    "ends": numbers(1.0, LEAST, HUGE, math.sqrt(0.5), math.sqrt(2), 1 + 2**-52, 1 - 2**-53),
}
ANGLES = {
    "half a turn": even("s1", -math.pi / 2, math.pi / 2),
    "small": np.concatenate([numbers(0.0, -0.0, 5e-324), even("s2", -1e-5, 1e-5)]),
}
COSINES = {
    "all": even("c1", -1, 1),
    "near one": 1 - even("c2", 0, 1) ** 8,
    "near minus one": even("c3", 0, 1) ** 8 - 1,
    "ends": numbers(1, -1, 0, -0.0, 1 - 2**-53, 2**-53 - 1, 5e-324),
}


@pytest.mark.parametrize("where", EXPONENTS)
def test_the_exponential_is_within_two_units_of_the_last_place(where: str) -> None:
    assert worst(exponential, mpmath.exp, EXPONENTS[where])[0] < 2


@pytest.mark.parametrize("where", LOGARITHMS)
def test_the_logarithm_is_within_a_unit_of_the_last_place(where: str) -> None:
    assert worst(logarithm, mpmath.log, LOGARITHMS[where])[0] < 1


@pytest.mark.parametrize("where", ANGLES)
def test_the_sine_is_within_three_units_of_the_last_place(where: str) -> None:
    assert worst(sine, mpmath.sin, ANGLES[where])[0] < 3


def test_the_sine_of_a_large_angle_is_close_too() -> None:
    multiples = numbers(*(n * math.pi for n in (1, 2, 3, 1000, 318309)))
    for angles in (even("s3", -1e6, 1e6), even("s4", -10, 10), multiples):
        assert worst(sine, mpmath.sin, angles)[1] < 2.0**-52 + 3 * 2.0**-53


@pytest.mark.parametrize("where", COSINES)
def test_the_arc_cosine_is_within_eight_units_of_the_last_place(where: str) -> None:
    assert worst(arc_cosine, mpmath.acos, COSINES[where])[0] < 8


def test_what_must_be_exact_is() -> None:
    assert exponential(numbers(0.0, -0.0)).tolist() == [1.0, 1.0]
    assert logarithm(numbers(1.0)).tolist() == [0.0]
    assert sine(numbers(0.0, -0.0)).tolist() == [0.0, 0.0]
    assert arc_cosine(numbers(1.0, -1.0)).tolist() == [0.0, math.pi]
    assert sine(arc_cosine(numbers(1.0))).tolist() == [0.0]


@SILENT
def test_the_exponential_stands_where_its_range_ends() -> None:
    ends = exponential(numbers(-708, 709))
    assert exponential(numbers(-708.1, -1e300, -math.inf)).tolist() == [float(ends[0])] * 3
    assert exponential(numbers(709.1, 1e300, math.inf)).tolist() == [float(ends[1])] * 3


@pytest.mark.parametrize("function", [exponential, logarithm, sine, arc_cosine])
@SILENT
def test_nan_stays_nan_and_spoils_nothing_else(function: Callable[[Array], Array]) -> None:
    found = function(numbers(0.5, math.nan, 0.25, -math.nan, 0.75))
    assert np.isnan(found).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("function", [exponential, logarithm, sine, arc_cosine])
def test_the_cut_of_the_work_changes_nothing(function: Callable[[Array], Array]) -> None:
    x = even("cut", 0.001, 1)
    whole = function(x.copy())
    for size in (1, 3, 7, 64, 1001):
        parts = [function(x[start : start + size].copy()) for start in range(0, COUNT, size)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert function(x.copy().reshape(40, 100)).tobytes() == whole.tobytes()


@pytest.mark.parametrize("function", [exponential, logarithm, sine, arc_cosine])
def test_nothing_comes_of_nothing(function: Callable[[Array], Array]) -> None:
    assert function(np.empty(0)).shape == (0,)
