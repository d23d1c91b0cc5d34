"""Rounding to each float dtype is torch's for float32, and the nearest for float64; numpy arrays of every dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kittybuild.builders.floats import largest, numpy_dtype, one_nan, rounded
from kittybuild.tensors import DType

FLOATS = [dtype for dtype in DType if dtype.is_float]
SHORT = [dtype for dtype in FLOATS if dtype.size < 4]


def torch_bits(values: np.ndarray, dtype: DType) -> np.ndarray:
    """The bits that torch rounds float32 values to."""
    made = torch.from_numpy(values).to(getattr(torch, dtype.torch_name))
    return made.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.size]).numpy()


def bits(array: np.ndarray, dtype: DType) -> np.ndarray:
    return array.view(f"i{dtype.size}" if dtype.size > 1 else "u1")


@pytest.mark.parametrize("dtype", list(DType))
def test_sizes_and_names(dtype: DType) -> None:
    assert numpy_dtype(dtype).itemsize == dtype.size


@pytest.mark.parametrize("dtype", FLOATS)
def test_float32_is_rounded_as_torch_rounds_it(dtype: DType) -> None:
    # every exponent and sign, with all upper halves of the mantissa, at ties and next to them
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | lower).view(np.float32)
        values = values[np.isfinite(values)].copy()
        if dtype in (DType.F8_E4M3, DType.F8_E5M2):
            values = values[abs(values) <= largest(dtype)]
        assert (bits(rounded(values, dtype), dtype) == torch_bits(values, dtype)).all(), hex(lower)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_too_large_becomes_infinite_or_nan(dtype: DType) -> None:
    values = np.array([largest(dtype), np.inf, -np.inf, np.nan])
    made = rounded(values, dtype).astype(np.float64)
    assert made[0] == largest(dtype)
    assert not np.isfinite(made[1:]).any()


@pytest.mark.parametrize("dtype", SHORT)
@given(st.lists(st.floats(width=64, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_float64_is_rounded_once(dtype: DType, numbers: list[float]) -> None:
    values = np.array(numbers)
    values = values[abs(values) <= largest(dtype)]
    made = rounded(values, dtype)
    step = bits(made, dtype).astype(np.int64)
    for value, got, near in zip(values.tolist(), made.astype(np.float64).tolist(), step.tolist(), strict=True):
        for other in (near - 1, near + 1):
            if other % (1 << (8 * dtype.size - 1)) >= 0 and other >= -(1 << (8 * dtype.size - 1)):
                neighbour = np.array([other & ((1 << 8 * dtype.size) - 1)], f"u{dtype.size}").view(numpy_dtype(dtype))
                beside = float(neighbour.astype(np.float64)[0])
                if np.isfinite(beside):
                    assert abs(value - got) <= abs(value - beside)


def test_a_tie_of_float64_is_seen_although_float32_hides_it() -> None:
    just_above = 1.0 + 2.0**-8 + 2.0**-40  # nearer to 1 + 2**-7, but float32 makes it the tie that goes to 1
    assert float(rounded(np.array([just_above]), DType.BF16)[0]) == 1.0 + 2.0**-7


@pytest.mark.parametrize("dtype", FLOATS)
def test_there_is_one_nan(dtype: DType) -> None:
    values = np.array([np.nan, 1.0, -np.nan], np.float32)
    values.view(np.uint32)[0] |= 0x8000_1234
    made = one_nan(rounded(values, dtype).copy(), dtype)
    found = bits(made, dtype)
    assert found[0] == found[2] == (0x7F if dtype.size == 1 else found[0])
    assert np.isnan(made.astype(np.float64)).tolist() == [True, False, True]
