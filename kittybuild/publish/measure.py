"""How far apart two tensors are, over blocks of any size: in units in the last place, and as vectors in float64.

The distance of two numbers is how many representable ones lie between them, plus one; plus and minus zero are at one
place. NaN is nowhere: two tensors of which only one has it at a place are infinitely far apart there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from kittybuild.builders.floats import numpy_dtype
from kittybuild.tensors import DType

if TYPE_CHECKING:
    import numpy as np

_INFINITY: Mapping[DType, int] = MappingProxyType(
    {
        DType.F64: 0x7FF0_0000_0000_0000,
        DType.F32: 0x7F80_0000,
        DType.F16: 0x7C00,
        DType.BF16: 0x7F80,
        DType.F8_E5M2: 0x7C,
        DType.F8_E4M3: 0x7E,  # the largest number: it has no infinity
    }
)
"""The bits of the last value that is not NaN."""


@dataclass(frozen=True, slots=True)
class Measures:
    """Two tensors as vectors, where both are finite: the largest difference of two elements; the norm of the difference
    over that of the first; the cosine of the angle. None where it is no number. `nonfinite`: elements left out."""

    max_abs: float | None
    relative: float | None
    cosine: float | None
    nonfinite: int = 0

    def to_json(self) -> dict[str, float | int | None]:
        """As `diff --json` and `reproduce --json` print it."""
        return {
            "max_abs": self.max_abs,
            "relative": self.relative,
            "cosine": self.cosine,
            "nonfinite": self.nonfinite,
        }


SAME = Measures(0.0, 0.0, 1.0)


class Measuring:
    """Takes two tensors block by block. `ulps` counts where both have one dtype, else it is None."""

    def __init__(self, one: DType, two: DType) -> None:
        self._dtypes = one, two
        self.elements, self.ulps = 0, 0 if one is two else None
        self._most = self._apart = self._first = self._second = self._product = 0.0
        self._nonfinite = 0

    def add(self, one: bytes | bytearray, two: bytes | bytearray) -> None:
        """The next elements of both, as many of one as of the other."""
        import numpy as np

        if self._dtypes[0] is self._dtypes[1]:
            left, right = (np.frombuffer(part, f"<u{self._dtypes[0].size}") for part in (one, two))
            count = int((left != right).sum())
            if count:
                here = distance(left, right, self._dtypes[0])
                self.ulps = None if self.ulps is None or here is None else max(self.ulps, here)
            self.elements += count
        values = [
            np.frombuffer(part, numpy_dtype(dtype)).astype(np.float64)
            for part, dtype in zip((one, two), self._dtypes, strict=True)
        ]
        if self._dtypes[0] is not self._dtypes[1]:
            self.elements += int((values[0] != values[1]).sum())
        self._measure(*values)

    def _measure(self, one: np.ndarray, two: np.ndarray) -> None:
        import numpy as np

        finite = np.isfinite(one) & np.isfinite(two)
        if not finite.all():
            self._nonfinite += int(finite.size - finite.sum())
            one, two = one[finite], two[finite]
        if not one.size:
            return
        apart = one - two
        self._most = max(self._most, float(np.abs(apart).max()))
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number is told as none
            self._apart += float(np.square(apart).sum())
            self._first += float(np.square(one).sum())
            self._second += float(np.square(two).sum())
            self._product += float((one * two).sum())

    def done(self) -> Measures:
        """What was measured."""
        if not self._apart and not self._nonfinite:
            return SAME
        relative = math.sqrt(self._apart / self._first) if self._first else math.inf
        norms = math.sqrt(self._first) * math.sqrt(self._second)
        cosine = self._product / norms if norms else math.nan
        most, relative_, cosine_ = (v if math.isfinite(v) else None for v in (self._most, relative, cosine))
        return Measures(most, relative_, cosine_, self._nonfinite)


def distance(left: np.ndarray, right: np.ndarray, dtype: DType) -> int | None:
    """The largest distance between elements, given by their bits; None for integers that differ, and for NaN."""
    import numpy as np

    differ = left != right
    if not differ.any():
        return 0
    if dtype not in _INFINITY:
        return None
    places = []
    for bits in (left[differ], right[differ]):
        sign = np.uint64(1) << np.uint64(8 * dtype.size - 1)
        wide = bits.astype(np.uint64)
        size = (wide & (sign - np.uint64(1))).astype(np.int64)
        if (size > _INFINITY[dtype]).any():
            return None
        places.append(np.where(wide & sign, -size, size))
    low, high = np.minimum(*places), np.maximum(*places)
    return int((high.view(np.uint64) - low.view(np.uint64)).max())  # modulo 2^64: right for float64, too
