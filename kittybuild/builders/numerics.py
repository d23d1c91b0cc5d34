"""Portable arithmetic (numerics class kitty-1): the same bits on every CPU, for every block size and thread count.

- Sums: each leaf of BLOCK elements is halved by element-wise float64 adds; leaf results are added in order.
- Selection: exact counting; among equals the lowest index wins.
- Scalars: correctly rounded at 120 bits by mpmath, then rounded once to float64.
- Matrix products: operands are cut into slices so short that float64 sums of their products are exact in any order
  (error-free splitting: Ozaki, Ogita, Oishi, Rump, Numerical Algorithms 59, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kittybuild.builders.base import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

_BITS = 120


def tree_sums(values: Tensor) -> Iterable[float]:
    """The leaf sums of a 1-D float64 tensor that starts at a leaf boundary; overwrites nothing."""
    import torch

    for start in range(0, values.numel(), BLOCK):
        leaf = values[start : start + BLOCK]
        width = 1 << max(0, leaf.numel() - 1).bit_length()
        if leaf.numel() != width:  # zeros do not change a sum
            leaf = torch.cat([leaf, leaf.new_zeros(width - leaf.numel())])
        while width > 1:
            width //= 2
            leaf = leaf[:width] + leaf[width:]
        yield float(leaf[0])


def dot(a: Tensor, b: Tensor) -> Iterable[float]:
    """The leaf sums of a * b; for float32 inputs each product is exact in float64."""
    return tree_sums(a.double() * b.double())


def arc_cosine_weights(cosine: float, t: float) -> tuple[float, float]:
    """sin((1-t)θ)/sin θ and sin(tθ)/sin θ for θ = arccos(cosine), |cosine| < 1, each rounded once to float64."""
    from mpmath import mp, mpf

    with mp.workprec(_BITS):
        theta = mp.acos(mpf(cosine))
        part = mpf(t)
        sine = mp.sin(theta)
        return float(mp.sin((1 - part) * theta) / sine), float(mp.sin(part * theta) / sine)


def exact_slices(matrix: Tensor, inner: int, *, rows: bool) -> list[tuple[Tensor, Tensor]]:
    """`matrix` as a sum of (integer-valued float64 slice, power-of-two scale per row or column) pairs.

    `inner` is the length of the sums that the slices will go into. Two slices hold at least 40 bits below the largest
    element of each row (column) for inner <= 8192; all-zero slices are left out.
    """
    import torch

    bits = (53 - math.ceil(math.log2(max(inner, 2)))) // 2
    rest = matrix.double()
    _, exponent = torch.frexp(rest.abs().amax(dim=1 if rows else 0, keepdim=True))
    slices = []
    for _ in range(2):
        scale = _power_of_two(exponent - bits)
        whole = torch.round(rest / scale)
        if bool(whole.any()):
            slices.append((whole, scale))
        rest = rest - whole * scale
        exponent = exponent - bits
    return slices


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent as float64, by its bits (exponents of float32 numbers, so never subnormal)."""
    import torch

    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def exact_product(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The product of two sliced matrices in float64, by exact partial products added in a fixed order; None for zero.

    The product of the two lowest slices lies below the rounding of the result and is left out when others exist.
    """
    total: Tensor | None = None
    for i, (a, row_scale) in enumerate(left):
        for j, (b, column_scale) in enumerate(right):
            if i + j < 2:
                part = (a @ b) * row_scale * column_scale
                total = part if total is None else total + part
    return total
