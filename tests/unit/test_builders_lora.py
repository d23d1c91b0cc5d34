"""LoRA: the exact product in float64, one rounding; the same bits for every block size and either way of storing W."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kittybuild.builders.base import BLOCK
from kittybuild.builders.lora import _rectangles
from tests.jobs import bits, drawn, make

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def factors(seed: str, rows: int, columns: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A [rank, columns] and B [rows, rank]."""
    return drawn(f"A {seed}", rank, columns, dtype=dtype), drawn(f"B {seed}", rows, rank, dtype=dtype)


def applied(
    weight: Tensor, *adapters: tuple[Tensor, Tensor, float], transposed: bool = False, blocks: int = 4
) -> Tensor:
    """What the builder makes of W and (A, B, scale) of each adapter."""
    inputs = [weight, *(factor for a, b, _ in adapters for factor in (a, b))]
    params = {"scales": [scale for _, _, scale in adapters], "transposed": transposed}
    return make("lora", inputs, params, blocks=blocks).tensor


def assert_near(found: Tensor, weight: Tensor, *adapters: tuple[Tensor, Tensor, float]) -> None:
    """Within one unit in the last place, but for what lies 2**-39 below the largest factors of a row and column."""
    wanted, slack = weight.double(), torch.zeros(weight.shape, dtype=torch.float64)
    for a, b, scale in adapters:
        wanted = wanted + scale * (b.double() @ a.double())
        largest = b.double().abs().amax(dim=1)[:, None] * a.double().abs().amax(dim=0)
        slack += abs(scale) * a.shape[0] * largest * 2.0**-39
    _, exponent = torch.frexp(wanted)
    digits = {torch.float64: 38, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[weight.dtype]
    unit = torch.ldexp(torch.ones_like(wanted), exponent - digits)
    assert ((found.double() - wanted).abs() <= unit + slack).all()


@settings(max_examples=100)
@given(
    st.integers(0, 50),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 2, 8, 16, 33]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 2.0, 0.5, 1 / 3, -0.7, 16.0]),
)
def test_lora_is_the_product_in_float64(
    seed: int, rows: int, columns: int, rank: int, dtype: torch.dtype, of_factors: torch.dtype, scale: float
) -> None:
    weight = drawn(f"W {seed}", rows, columns, dtype=dtype)
    a, b = factors(f"{seed}", rows, columns, rank, of_factors)
    found = applied(weight, (a, b, scale))
    assert found.dtype == dtype
    assert_near(found, weight, (a, b, scale))
    turned = applied(weight.T.contiguous(), (a, b, scale), transposed=True)
    assert bits(turned.T.contiguous()) == bits(found)


@pytest.mark.parametrize("shape", [(2, 100_000), (100_000, 2), (3, BLOCK), (5, BLOCK + 1), (997, 331), (1, 200_000)])
def test_the_block_size_changes_nothing(shape: tuple[int, int]) -> None:
    weight = drawn("long W", *shape, dtype=torch.bfloat16)
    a, b = factors("long", *shape, rank=3)
    made = [applied(weight, (a, b, 0.3), blocks=blocks) for blocks in (1, 2, 3, 64)]
    assert len({bits(one) for one in made}) == 1
    assert_near(made[0], weight, (a, b, 0.3))
    turned = applied(weight.T.contiguous(), (a, b, 0.3), transposed=True, blocks=1)
    assert bits(turned.T.contiguous()) == bits(made[0])


@given(st.integers(1, 12), st.integers(0, 100), st.integers(0, 60))
def test_rectangles_cover_a_block_in_order_and_are_three_at_most(columns: int, start: int, length: int) -> None:
    index = torch.arange(200 * columns).reshape(200, columns)
    found = list(_rectangles(start, start + length, columns))
    assert len(found) <= 3
    parts = [index[rows, across].reshape(-1) for rows, across in found]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *parts]).tolist() == list(range(start, start + length))


def test_several_adapters_are_added_as_differences() -> None:
    weight = drawn("W", 37, 41, dtype=torch.bfloat16)
    one, two, three = (
        (*factors(name, 37, 41, rank), scale) for name, rank, scale in (("1", 4, 1.0), ("2", 7, -0.3), ("3", 1, 9.0))
    )
    together = applied(weight, one, two, three)
    assert_near(together, weight, one, two, three)
    assert bits(applied(weight, one, two)) == bits(applied(weight, two, one))
    assert bits(together) != bits(applied(applied(weight, one), two, three)), "the sum is rounded once, not twice"
    opposite = (one[0], -one[1], one[2])
    assert bits(applied(weight, one, opposite)) == bits(weight), "what cancels leaves nothing behind"


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_difference_changes_nothing(dtype: torch.dtype) -> None:
    weight, (a, b) = drawn("W", 8, 6, dtype=dtype), factors("none", 8, 6, 4)
    assert bits(applied(weight)) == bits(weight)
    assert bits(applied(weight, (a, b, 0.0))) == bits(weight)
    assert bits(applied(weight, (a, torch.zeros_like(b), 2.0))) == bits(weight)


def test_a_small_difference_of_a_large_weight_is_rounded_once() -> None:
    weight = torch.full((1, 1), 1 + 2.0**-23)
    a, b = torch.full((1, 1), 2.0**-24), torch.ones(1, 1)
    just_above, half = (a * (1 + 2.0**-20), b, 1.0), (a, b, 1.0)
    assert applied(weight, just_above).item() == 1 + 2 * 2.0**-23
    assert applied(weight, half).item() == 1 + 2 * 2.0**-23, "a tie goes to the even neighbour"
    assert applied(torch.ones(1, 1), half).item() == 1.0


def test_a_nan_or_infinity_in_a_factor_is_never_lost() -> None:
    weight, (a, b) = drawn("W", 3, 3), factors("bad", 3, 3, 2)
    for bad in (math.nan, math.inf):
        a[0, 1] = bad
        for side in (b, torch.zeros_like(b)):
            assert applied(weight, (a, side, 1.0)).isfinite().tolist() == [[True, False, True]] * 3
