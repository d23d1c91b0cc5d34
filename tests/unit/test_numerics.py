"""Sums, scalars and matrix products against exact references, for every way of cutting the work."""

from __future__ import annotations

import math
import struct
import threading
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kittybuild.builders.base import BLOCK
from kittybuild.builders.merge.common import as_float32
from kittybuild.builders.numerics import (
    arc_cosine_weights,
    dots,
    exact_product,
    exact_slices,
    tree_sums,
)
from tests import jobs
from tests.jobs import halved

Array = NDArray[Any]


def drawn(seed: str, *shape: int, double: bool = False, scale: float = 1.0) -> Array:
    """The numbers of tests.jobs as an array."""
    return jobs.drawn(seed, *shape, dtype=torch.float64 if double else torch.float32, scale=scale).numpy()


# ---- sums


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 9, 1000, 1023, 1024, 1025, 65_535, 65_536])
def test_a_tree_sum_is_its_definition(width: int) -> None:
    rows = drawn(f"rows {width}", 3, width, double=True, scale=1e10)
    expected = [halved(row.tolist()) for row in rows]
    assert tree_sums(rows.copy()) == expected
    assert tree_sums(rows[1:2].copy()) == expected[1:2]


def test_dots_are_the_same_for_every_cut_at_leaves() -> None:
    count = 3 * BLOCK + 777
    a, b = drawn("a", count), drawn("b", count)
    pairs = ((0, 0), (1, 1), (0, 1))
    whole = list(dots((a, b), pairs))
    assert len(whole) == 4
    for leaves in (1, 2, 3):
        parts = [(a[i : i + leaves * BLOCK], b[i : i + leaves * BLOCK]) for i in range(0, count, leaves * BLOCK)]
        assert [leaf for part in parts for leaf in dots(part, pairs)] == whole
    for start, leaf in zip(range(0, count, BLOCK), whole, strict=True):
        x, y = (t[start : start + BLOCK].astype(float).tolist() for t in (a, b))
        assert leaf == [halved([p * q for p, q in zip(u, v, strict=True)]) for u, v in ((x, x), (y, y), (x, y))]


def test_dots_of_nothing_and_of_a_scalar() -> None:
    assert list(dots((np.empty(0, np.float32),), ((0, 0),))) == []
    assert list(dots((np.array([3.0], np.float32),), ((0, 0),))) == [[9.0]]


def test_dots_leave_their_arrays_alone() -> None:
    for double in (False, True):
        a = drawn("alone", 100, double=double)
        before = a.copy()
        list(dots((a, a), ((0, 1),)))
        assert np.array_equal(a, before)


# ---- scalars


def reference_weights(cosine: float, t: float) -> tuple[float, float]:
    with mpmath.workdps(120):
        theta = mpmath.acos(mpmath.mpf(cosine))
        sine, part = mpmath.sin(theta), mpmath.mpf(t)
        return float(mpmath.sin((1 - part) * theta) / sine), float(mpmath.sin(part * theta) / sine)


@settings(max_examples=200)
@given(st.floats(-0.9995, 0.9995), st.floats(0, 1))
def test_slerp_weights_are_correctly_rounded(cosine: float, t: float) -> None:
    assert arc_cosine_weights(cosine, t) == reference_weights(cosine, t)


@given(st.floats(-0.9995, 0.9995), st.floats(-9, 10))
def test_slerp_weights_beyond_the_ends_are_exact_to_the_last_of_thirty_digits(cosine: float, t: float) -> None:
    for found, wanted in zip(arc_cosine_weights(cosine, t), reference_weights(cosine, t), strict=True):
        assert abs(found - wanted) <= max(1e-30, math.ulp(wanted) if found != wanted else 0)


@given(st.floats(-0.9995, 0.9995))
def test_the_ends_of_the_arc_are_exact(cosine: float) -> None:
    assert arc_cosine_weights(cosine, 0.0) == (1.0, 0.0)
    assert arc_cosine_weights(cosine, 1.0) == (0.0, 1.0)
    near, far = arc_cosine_weights(cosine, 0.5)
    assert near == far


def test_slerp_weights_do_not_depend_on_other_threads_or_on_their_precision() -> None:
    cases = [(math.cos(0.1 + i / 100), i / 250) for i in range(250)]
    expected = [reference_weights(*case) for case in cases]
    wrong: list[int] = []

    def worker() -> None:
        wrong.extend(i for i, case in enumerate(cases) if arc_cosine_weights(*case) != expected[i])

    threads = [threading.Thread(target=worker) for _ in range(4)]
    before = mpmath.mp.prec
    mpmath.mp.prec = 20
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert mpmath.mp.prec == 20
    finally:
        mpmath.mp.prec = before
    assert wrong == []


def test_scalars_are_rounded_to_float32_as_ieee_says() -> None:
    largest = (2 - 2.0**-23) * 2.0**127
    assert as_float32(0.1) == struct.unpack("<f", struct.pack("<f", 0.1))[0] != 0.1
    assert as_float32(largest) == as_float32(largest * (1 + 2.0**-26)) == largest
    assert as_float32(1e39) == math.inf
    assert as_float32(-1e39) == -math.inf
    assert as_float32(1e-46) == 0.0
    assert math.isnan(as_float32(math.nan))


# ---- matrix products


def product(left: Array, right: Array) -> Array:
    inner = left.shape[1]
    return exact_product(exact_slices(left, inner, rows=True), exact_slices(right, inner, rows=False))


def exactly(left: Array, right: Array) -> list[list[Fraction]]:
    rows = [[Fraction(v) for v in row] for row in left.astype(float).tolist()]
    columns = [[Fraction(v) for v in column] for column in right.astype(float).T.tolist()]
    return [[sum((p * q for p, q in zip(r, c, strict=True)), Fraction(0)) for c in columns] for r in rows]


def assert_close_to_exact(left: Array, right: Array) -> None:
    """Within inner * 2**-39 of the largest row element times the largest column element, and a float64 rounding."""
    found = product(left, right).tolist()
    for i, row in enumerate(exactly(left, right)):
        for j, exact in enumerate(row):
            largest = Fraction(float(abs(left[i]).max())) * Fraction(float(abs(right[:, j]).max()))
            assert abs(Fraction(found[i][j]) - exact) <= left.shape[1] * largest * Fraction(1, 1 << 39), (i, j)


@pytest.mark.parametrize("inner", [1, 2, 3, 8, 16, 64, 255, 1024])
def test_a_product_is_near_the_exact_one(inner: int) -> None:
    assert_close_to_exact(drawn(f"left {inner}", 4, inner), drawn(f"right {inner}", inner, 5, scale=1e-3))


EXPONENTS = (-149, -140, -126, -60, 0, 60, 126, 127)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(EXPONENTS), min_size=6, max_size=6), st.integers(0, 1000))
def test_rows_and_columns_of_any_magnitude(exponents: list[int], seed: int) -> None:
    powers = np.array([2.0**e for e in exponents])
    left = (drawn(f"l{seed}", 3, 4, double=True) * powers[:3, None]).astype(np.float32)
    right = (drawn(f"r{seed}", 4, 3, double=True) * powers[3:]).astype(np.float32)
    assert_close_to_exact(left, right)


def test_short_factors_of_like_magnitude_give_the_exact_product() -> None:
    left, right = (np.rint(drawn(name, *shape) * 256) / 256 for name, shape in (("l", (6, 32)), ("r", (32, 6))))
    found = product(left, right).tolist()
    assert [[Fraction(v) for v in row] for row in found] == exactly(left, right)


def test_a_product_is_the_same_for_every_split_and_inner_order() -> None:
    left, right = drawn("left", 37, 24), drawn("right", 24, 41, scale=30)
    whole = product(left, right)
    a, b = exact_slices(left, 24, rows=True), exact_slices(right, 24, rows=False)
    for rows in (slice(0, 1), slice(5, 29), slice(36, 37)):
        for columns in (slice(0, 41), slice(3, 4), slice(40, 41)):
            part = exact_product([s[rows] for s in a], [s[:, columns] for s in b])
            assert part.tobytes() == whole[rows, columns].tobytes()
    order = np.arange(24) * 7 % 24
    assert product(left[:, order], right[order]).tobytes() == whole.tobytes()
    assert product(right.T, left.T).T.tobytes() == whole.tobytes()
    strided = product(left.T.copy().T, right.T.copy().T)
    assert strided.tobytes() == whole.tobytes()


def test_slices_hold_small_integers_and_add_up() -> None:
    matrix, inner = drawn("slices", 9, 16), 16
    slices = exact_slices(matrix, inner, rows=True)
    assert (abs(slices[0] + slices[1] - matrix) <= abs(matrix).max(axis=1, keepdims=True) * 2.0**-48).all()
    for part in slices:
        _, exponent = np.frexp(abs(part).max(axis=1, keepdims=True))
        whole = np.ldexp(part, 25 - exponent)
        assert np.array_equal(whole, np.rint(whole))
        assert float(abs(whole).max()) <= 2**25


@pytest.mark.parametrize("double", [True, False])
def test_slicing_leaves_the_matrix_alone(double: bool) -> None:
    matrix = drawn("alone", 4, 4, double=double)
    before = matrix.copy()
    exact_slices(matrix, 4, rows=True)
    assert np.array_equal(matrix, before)


@pytest.mark.parametrize("value", [0.0, 2.0**-149, 2.0**-126, (2 - 2.0**-23) * 2.0**127])
@pytest.mark.parametrize("other", [0.0, 2.0**-149, 1.0, (2 - 2.0**-23) * 2.0**127])
def test_zero_smallest_and_largest_factors(value: float, other: float) -> None:
    left, right = np.full((2, 3), value, np.float32), np.full((3, 2), other, np.float32)
    assert product(left, right).tolist() == [[3 * value * other] * 2] * 2


def test_a_float64_row_too_small_for_its_scale_counts_as_zero() -> None:
    left = np.array([[1e-300], [1.0], [5e-324], [1e300]])
    assert product(left, np.ones((1, 1))).ravel().tolist() == [0.0, 1.0, 0.0, 1e300]


@pytest.mark.parametrize("inner", [1, 2, 9])
def test_zeros_of_a_product_are_positive(inner: int) -> None:
    left, right = np.full((2, inner), -0.0), np.array([[1.0, -0.0, 0.0]] * inner)
    assert not np.signbit(product(left, right)).any()
    assert not np.signbit(product(right.T, left.T)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@np.errstate(all="ignore")  # as while a builder runs
def test_what_is_not_finite_spoils_its_row_or_column_only_and_is_never_lost(bad: float) -> None:
    left, right = np.ones((3, 2), np.float32), np.zeros((2, 3), np.float32)
    left[1, 0] = bad
    assert np.isfinite(product(left, right)).tolist() == [[True] * 3, [False] * 3, [True] * 3]
    right[:] = 1
    assert np.isfinite(product(left, right)).tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert np.isfinite(product(right.T, left.T)).tolist() == [[True, False, True]] * 3
