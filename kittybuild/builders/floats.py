"""Element types as numpy knows them, and the one rounding from the working precision to them.

bfloat16 and the float8 types are those of ml_dtypes. A value is rounded to nearest, ties to even, once; every NaN is
the same NaN.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kittybuild.tensors import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_OF_ML_DTYPES = MappingProxyType({DType.BF16: "bfloat16", DType.F8_E4M3: "float8_e4m3fn", DType.F8_E5M2: "float8_e5m2"})
_QUIET = MappingProxyType(
    {
        DType.F64: 0x7FF8_0000_0000_0000,
        DType.F32: 0x7FC0_0000,
        DType.F16: 0x7E00,
        DType.BF16: 0x7FC0,
        DType.F8_E5M2: 0x7F,
        DType.F8_E4M3: 0x7F,
    }
)


def numpy_dtype(dtype: DType) -> Any:
    """numpy's name for a dtype."""
    import numpy as np

    if dtype in _OF_ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _OF_ML_DTYPES[dtype]))
    return np.dtype(dtype.torch_name)


def largest(dtype: DType) -> float:
    """The largest finite number of a float dtype."""
    import ml_dtypes

    return float(ml_dtypes.finfo(numpy_dtype(dtype)).max)  # type: ignore[no-untyped-call]


def rounded(result: Array, dtype: DType) -> Array:
    """`result` (float32, float64, or the dtype itself) rounded once to `dtype`.

    Shorter floats are rounded from float32: float64 comes to it by rounding to odd, which loses nothing.
    """
    import numpy as np

    wanted = numpy_dtype(dtype)
    if result.dtype == wanted:
        return result
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is the right answer, and counted elsewhere
        if result.dtype == np.float64 and dtype.is_float and dtype.size < 4:
            result = _rounded_to_odd(result)
        return result.astype(wanted)


def _rounded_to_odd(result: Array) -> Array:
    """float64 to float32 toward zero, with the last bit set where that is inexact."""
    import numpy as np

    near = result.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.int32)
    bits -= np.abs(back) > np.abs(result)
    bits |= back != result
    return near


def one_nan(array: Array, dtype: DType) -> Array:
    """`array` of a float dtype in place with one bit pattern for every NaN; which one arises depends on the CPU."""
    import numpy as np

    array.view(f"u{dtype.size}")[np.isnan(array)] = _QUIET[dtype]
    return array
