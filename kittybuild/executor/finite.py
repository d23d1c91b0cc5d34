"""NaN and infinities: counted by the bits of the exponent, for bytes of every float dtype, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kittybuild.errors import BuildError
from kittybuild.tensors import DType

_SHOWN = 6

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


def not_finite(stage: str, counts: Mapping[str, int]) -> BuildError:
    """The error for tensors of a stage that hold so many of them."""
    names = list(counts)
    shown = "".join(f"\n  {name}: {counts[name]:,}" for name in names[:_SHOWN])
    more = f"\n  and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    what = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
    hint = "see whether the inputs hold them or the parameters make them; `allow_nan: true` lets them pass"
    message = f"{what} would hold elements that are NaN or infinite:{shown}{more}"
    return BuildError("KB508", message, at=stage, hint=hint)
