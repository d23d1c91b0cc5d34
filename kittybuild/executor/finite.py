"""Counting NaN and infinities by the bits of the exponent, without torch: for bytes of every float dtype."""

from __future__ import annotations

from types import MappingProxyType

from kittybuild.tensors import DType

_ALL_ONES = MappingProxyType(
    {
        DType.F64: 0x7FF0_0000_0000_0000,
        DType.F32: 0x7F80_0000,
        DType.F16: 0x7C00,
        DType.BF16: 0x7F80,
        DType.F8_E5M2: 0x7C,
        DType.F8_E4M3: 0x7F,  # it has no infinity: only all bits are NaN
    }
)


def nonfinite(data: memoryview, dtype: DType) -> int:
    """How many elements in `data`, of a float dtype, are NaN or infinite."""
    import numpy as np

    bits = np.frombuffer(data, dtype=f"<u{dtype.size}")
    ones = bits.dtype.type(_ALL_ONES[dtype])
    return int(np.count_nonzero((bits & ones) == ones))
