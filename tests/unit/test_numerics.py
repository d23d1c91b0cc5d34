"""Sums, scalars, matrix products and roundings against exact references, for every way of cutting the work."""

from __future__ import annotations

import math
import struct
import threading
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kittybuild.builders.base import BLOCK
from kittybuild.builders.merge.common import as_float32
from kittybuild.builders.numerics import (
    arc_cosine_weights,
    dots,
    exact_product,
    exact_slices,
    one_nan,
    rounded,
    tree_sums,
)
from tests.jobs import bits, drawn, halved

SHORT = (torch.float16, torch.bfloat16)


# ---- sums


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 9, 1000, 1023, 1024, 1025, 65_535, 65_536])
def test_a_tree_sum_is_its_definition(width: int) -> None:
    rows = drawn(f"rows {width}", 3, width, dtype=torch.float64, scale=1e10)
    expected = [halved(row.tolist()) for row in rows]
    assert tree_sums(rows.clone()) == expected
    assert tree_sums(rows[1:2].clone()) == expected[1:2]


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
        x, y = (t[start : start + BLOCK].double().tolist() for t in (a, b))
        assert leaf == [halved([p * q for p, q in zip(u, v, strict=True)]) for u, v in ((x, x), (y, y), (x, y))]


def test_dots_of_nothing_and_of_a_scalar() -> None:
    assert list(dots((torch.empty(0),), ((0, 0),))) == []
    assert list(dots((torch.tensor([3.0]),), ((0, 0),))) == [[9.0]]


def test_dots_leave_their_tensors_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        a = drawn("alone", 100, dtype=dtype)
        before = a.clone()
        list(dots((a, a), ((0, 1),)))
        assert torch.equal(a, before)


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


def product(left: Tensor, right: Tensor) -> Tensor:
    inner = left.shape[1]
    return exact_product(exact_slices(left, inner, rows=True), exact_slices(right, inner, rows=False))


def exactly(left: Tensor, right: Tensor) -> list[list[Fraction]]:
    rows = [[Fraction(v) for v in row] for row in left.double().tolist()]
    columns = [[Fraction(v) for v in column] for column in right.double().T.tolist()]
    return [[sum((p * q for p, q in zip(r, c, strict=True)), Fraction(0)) for c in columns] for r in rows]


def assert_close_to_exact(left: Tensor, right: Tensor) -> None:
    """Within inner * 2**-39 of the largest row element times the largest column element, and a float64 rounding."""
    found = product(left, right).tolist()
    for i, row in enumerate(exactly(left, right)):
        for j, exact in enumerate(row):
            largest = Fraction(float(left[i].abs().max())) * Fraction(float(right[:, j].abs().max()))
            assert abs(Fraction(found[i][j]) - exact) <= left.shape[1] * largest * Fraction(1, 1 << 39), (i, j)


@pytest.mark.parametrize("inner", [1, 2, 3, 8, 16, 64, 255, 1024])
def test_a_product_is_near_the_exact_one(inner: int) -> None:
    assert_close_to_exact(drawn(f"left {inner}", 4, inner), drawn(f"right {inner}", inner, 5, scale=1e-3))


EXPONENTS = (-149, -140, -126, -60, 0, 60, 126, 127)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(EXPONENTS), min_size=6, max_size=6), st.integers(0, 1000))
def test_rows_and_columns_of_any_magnitude(exponents: list[int], seed: int) -> None:
    powers = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)
    left = (drawn(f"l{seed}", 3, 4, dtype=torch.float64) * powers[:3, None]).float()
    right = (drawn(f"r{seed}", 4, 3, dtype=torch.float64) * powers[3:]).float()
    assert_close_to_exact(left, right)


def test_short_factors_of_like_magnitude_give_the_exact_product() -> None:
    left, right = drawn("l", 6, 32, dtype=torch.bfloat16).float(), drawn("r", 32, 6, dtype=torch.bfloat16).float()
    left, right = torch.round(left * 256) / 256, torch.round(right * 256) / 256
    found = product(left, right).tolist()
    assert [[Fraction(v) for v in row] for row in found] == exactly(left, right)


def test_a_product_is_the_same_for_every_split_and_inner_order() -> None:
    left, right = drawn("left", 37, 24), drawn("right", 24, 41, scale=30)
    whole = product(left, right)
    a, b = exact_slices(left, 24, rows=True), exact_slices(right, 24, rows=False)
    for rows in (slice(0, 1), slice(5, 29), slice(36, 37)):
        for columns in (slice(0, 41), slice(3, 4), slice(40, 41)):
            part = exact_product([s[rows] for s in a], [s[:, columns] for s in b])
            assert bits(part) == bits(whole[rows, columns].contiguous())
    order = torch.arange(24).mul(7).remainder(24)
    assert bits(product(left[:, order], right[order])) == bits(whole)
    assert bits(product(right.T, left.T).T.contiguous()) == bits(whole)
    strided = product(left.T.contiguous().T, right.T.contiguous().T)
    assert bits(strided) == bits(whole)


def test_slices_hold_small_integers_and_add_up() -> None:
    matrix, inner = drawn("slices", 9, 16), 16
    slices = exact_slices(matrix, inner, rows=True)
    assert ((slices[0] + slices[1] - matrix).abs() <= matrix.abs().amax(dim=1, keepdim=True) * 2.0**-48).all()
    for part in slices:
        _, exponent = torch.frexp(part.abs().amax(dim=1, keepdim=True))
        whole = torch.ldexp(part, 25 - exponent)
        assert torch.equal(whole, whole.round())
        assert float(whole.abs().max()) <= 2**25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slicing_leaves_the_matrix_alone(dtype: torch.dtype) -> None:
    matrix = drawn("alone", 4, 4, dtype=dtype)
    before = matrix.clone()
    exact_slices(matrix, 4, rows=True)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("value", [0.0, 2.0**-149, 2.0**-126, (2 - 2.0**-23) * 2.0**127])
@pytest.mark.parametrize("other", [0.0, 2.0**-149, 1.0, (2 - 2.0**-23) * 2.0**127])
def test_zero_smallest_and_largest_factors(value: float, other: float) -> None:
    left, right = torch.full((2, 3), value), torch.full((3, 2), other)
    assert product(left, right).tolist() == [[3 * value * other] * 2] * 2


def test_a_float64_row_too_small_for_its_scale_counts_as_zero() -> None:
    left = torch.tensor([[1e-300], [1.0], [5e-324], [1e300]], dtype=torch.float64)
    assert product(left, torch.ones(1, 1, dtype=torch.float64)).flatten().tolist() == [0.0, 1.0, 0.0, 1e300]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_row_or_column_only_and_is_never_lost(bad: float) -> None:
    left, right = torch.ones(3, 2), torch.zeros(2, 3)
    left[1, 0] = bad
    assert product(left, right).isfinite().tolist() == [[True] * 3, [False] * 3, [True] * 3]
    right[:] = 1
    assert product(left, right).isfinite().tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert product(right.T, left.T).isfinite().tolist() == [[True, False, True]] * 3


# ---- rounding


def all_numbers(dtype: torch.dtype) -> np.ndarray:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return np.unique(every[every.isfinite()].double().numpy())


def nearest(value: float, dtype: torch.dtype, numbers: np.ndarray) -> float:
    """The nearest number of a short dtype, ties to even, by exact arithmetic."""
    place = int(np.searchsorted(numbers, value))
    around = [float(n) for n in numbers[max(0, place - 1) : place + 1]]
    best = min(abs(Fraction(n) - Fraction(value)) for n in around)
    found = [n for n in around if abs(Fraction(n) - Fraction(value)) == best]
    even = [n for n in found if int(torch.tensor(n).to(dtype).view(torch.int16)) % 2 == 0]
    return even[0] if len(found) == 2 else found[0]


@pytest.mark.parametrize("dtype", SHORT)
def test_float64_is_rounded_once(dtype: torch.dtype) -> None:
    last = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    tricky = [
        sign * (1 + k * last + half * last / 2 + nudge)
        for sign in (1, -1)
        for k in (0, 1, 2)
        for half in (0, 1)
        for nudge in (0.0, 2.0**-40, -(2.0**-40))
    ]
    tricky += [1e-8, -3e-8, 2.0**-24, 2.0**-25, 2.0**-25 + 2.0**-60, 6e-5, 60000.0]
    found = rounded(torch.tensor(tricky, dtype=torch.float64), dtype)
    numbers = all_numbers(dtype)
    assert found.double().tolist() == [nearest(v, dtype, numbers) for v in tricky]


def test_float64_beyond_the_range_rounds_to_infinity_or_zero() -> None:
    values = torch.tensor([1e300, -1e300, 3.4e38, math.inf, math.nan, 1e-300, -1e-300, -0.0], dtype=torch.float64)
    for dtype in SHORT:
        found = rounded(values, dtype).float().tolist()
        assert found[:4] == [math.inf, -math.inf, math.inf if dtype is torch.float16 else found[2], math.inf]
        assert math.isnan(found[4])
        assert [math.copysign(1, v) for v in found[5:]] == [1, -1, -1]
        assert found[5:] == [0, 0, 0]


@settings(max_examples=200)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.sampled_from(SHORT))
def test_rounding_from_float32_is_torchs(values: list[float], dtype: torch.dtype) -> None:
    short = torch.tensor(values)
    assert bits(one_nan(rounded(short, dtype))) == bits(one_nan(short.to(dtype)))
    assert bits(one_nan(rounded(short.double(), dtype))) == bits(one_nan(short.to(dtype)))


FLOATS = (torch.float64, torch.float32, *SHORT, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_nan_becomes_the_same_nan_and_nothing_else_changes(dtype: torch.dtype) -> None:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int64) << max(0, 8 * dtype.itemsize - 16)
    values = every.to(kind).view(dtype)
    expected = values.clone()
    nan = values.isnan()
    assert nan.any()
    found = one_nan(values)
    assert torch.equal(found.view(kind)[~nan], expected.view(kind)[~nan])
    patterns = found.view(kind)[nan].unique()
    assert len(patterns) == 1
    assert found.isnan().tolist() == nan.tolist()
    assert int(patterns[0]) > 0
