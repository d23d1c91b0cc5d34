"""Portable arithmetic (numerics class kitty-1): the same bits on every CPU, for every block size and thread count.

- Sums: each leaf of BLOCK elements is halved by element-wise float64 adds; leaf results are added in order.
- Selection: exact counting; among equals the lowest index wins.
- Scalars: correctly rounded at 120 bits by mpmath, then rounded once to float64.
- Matrix products: operands are cut into slices so short that float64 sums of their products are exact in any order
  (error-free splitting: Ozaki, Ogita, Oishi, Rump, Numerical Algorithms 59, 2012).
- Results: rounded once, from float64 too; every NaN is the same NaN.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kittybuild.builders.base import BLOCK

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BITS = 120
_MPMATH = threading.Lock()
"""mpmath keeps constants in variables that two threads may not fill at once."""
_SMALLEST = -900
"""Exponent at which a row of a matrix counts as zero: far below float32, far above where float64 scales end."""


def tree_sums(rows: Tensor) -> list[float]:
    """The sum of each row of a 2-D float64 tensor, as if filled with zeros to a power of two; overwrites it."""
    values = rows.numpy()  # the same sums as torch's, in a third of the time: most steps are short
    width = values.shape[1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        values[:, : width - half] += values[:, half:width]
        width = half
    return values[:, 0].tolist()  # type: ignore[no-any-return]


def dots(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Iterator[list[float]]:
    """For each leaf of 1-D tensors that start at a leaf boundary, the dot products of these pairs of them.

    The products are exact for float32 tensors, and rounded once for float64.
    """
    import torch

    for start in range(0, tensors[0].numel(), BLOCK):
        leaves = [tensor[start : start + BLOCK].double() for tensor in tensors]
        products = leaves[0].new_empty(len(pairs), len(leaves[0]))
        for row, (i, j) in zip(products, pairs, strict=True):
            torch.mul(leaves[i], leaves[j], out=row)
        yield tree_sums(products)


def arc_cosine_weights(cosine: float, t: float) -> tuple[float, float]:
    """sin((1-t)θ)/sin θ and sin(tθ)/sin θ for θ = arccos(cosine), |cosine| < 1, each rounded once to float64.

    (Outside 0 <= t <= 1 a sine may be so close to zero that the last bits of the float64 are not the nearest.)
    """
    # libmp's functions take their precision; that of the context mpmath.mp would be shared with other threads.
    from mpmath.libmp import fone, from_float, mpf_acos, mpf_div, mpf_mul, mpf_sin, mpf_sub, round_nearest, to_float

    def sine(part: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        return mpf_sin(mpf_mul(part, theta, _BITS, round_nearest), _BITS, round_nearest)  # type: ignore[no-any-return]

    with _MPMATH:
        theta = mpf_acos(from_float(cosine), _BITS, round_nearest)
        part = from_float(t)
        whole = mpf_sin(theta, _BITS, round_nearest)
        parts = mpf_sub(fone, part, _BITS, round_nearest), part
        near, far = (to_float(mpf_div(sine(p), whole, _BITS, round_nearest), rnd=round_nearest) for p in parts)
    return near, far


def exact_slices(matrix: Tensor, inner: int, *, rows: bool) -> list[Tensor]:
    """One or two float64 slices whose sum is `matrix`, each of few enough leading bits for exact products.

    Each row (column) of a slice holds integers below 2 ** bits times one power of two, where sums of `inner` products
    of such integers stay below 2 ** 53. Two slices hold at least 40 bits below the largest element of each row (column)
    for inner <= 8192.
    """
    import torch

    bits = (53 - math.ceil(math.log2(max(inner, 2)))) // 2
    rest = matrix.to(torch.float64, copy=True)
    _, exponent = torch.frexp(rest.abs().amax(dim=1 if rows else 0, keepdim=True))
    exponent.clamp_(_SMALLEST, 1024)  # an element that is not finite has any exponent
    slices = []
    for step in (1, 2):
        scale = _power_of_two(exponent - step * bits)
        part = torch.div(rest, scale).round_().mul_(scale)
        rest.sub_(part)
        if step == 1 or bool(part.any()):
            slices.append(part)
    return slices


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent as float64, by its bits; for exponents of normal numbers."""
    import torch

    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def exact_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The product of two sliced matrices in float64, by exact partial products. Its transpose has the same bits.

    The product of the two second slices lies below the rounding of the result and is left out.
    """
    total = left[0] @ right[0]
    lesser = [left[0] @ second for second in right[1:]] + [second @ right[0] for second in left[1:]]
    if len(lesser) == 2:  # added to each other first, so that neither side comes before the other
        lesser[0].add_(lesser.pop())
    return total.add_(lesser[0]) if lesser else total


def rounded(result: Tensor, dtype: torch.dtype) -> Tensor:
    """`result` rounded once to `dtype`, to nearest, ties to even.

    torch rounds float64 to float32 on the way to shorter floats: here that step rounds to odd, which loses nothing.
    """
    import torch

    if result.dtype == torch.float64 and dtype.is_floating_point and dtype.itemsize < 4:
        result = _rounded_to_odd(result)
    return result.to(dtype)


def _rounded_to_odd(result: Tensor) -> Tensor:
    """float64 to float32 toward zero, with the last bit set where that is inexact."""
    import torch

    near = result.float()
    back = near.double()
    bits = near.view(torch.int32)
    bits -= (back.abs() > result.abs()).int()
    bits |= (back != result).int()
    return near


def one_nan(tensor: Tensor) -> Tensor:
    """`tensor` in place with one bit pattern for every NaN; which one arises depends on the CPU."""
    import torch

    quiet = {2: 0x7E00, 4: 0x7FC0_0000, 8: 0x7FF8_0000_0000_0000}
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = tensor.element_size()
    pattern = 0x7FC0 if tensor.dtype == torch.bfloat16 else quiet.get(size, 0x7F)
    tensor.view(integers[size]).masked_fill_(tensor.isnan(), pattern)
    return tensor
