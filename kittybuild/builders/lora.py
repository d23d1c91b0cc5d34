"""LoRA: a weight plus the weighted products of adapter factors, one tensor at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.numerics import exact_product, exact_slices

if TYPE_CHECKING:
    from torch import Tensor


def _lora(job: Job) -> Combine:
    """W + sum over adapters of scale * (B A), in kitty-1: exact products, float64 sum, one rounding to float32.

    Inputs: W [rows, columns], then A [r, in] and B [out, r] of each adapter. Params: `scales` (one per adapter),
    `transposed` (W is stored [in, out]: the product is transposed). Source: Hu et al. 2021, LoRA, section 4.1.
    """
    transposed = job.params["transposed"]
    columns = job.output.shape[1]
    factors = []
    for index, scale in enumerate(job.params["scales"]):
        a, b = job.whole(1 + 2 * index), job.whole(2 + 2 * index)
        left, right = (a.T, b.T) if transposed else (b, a)
        inner = right.shape[0]
        factors.append((exact_slices(left, inner, rows=True), exact_slices(right, inner, rows=False), scale))

    def combine(block: Block) -> Tensor:
        weight = block.inputs[0]
        stop = block.start + weight.numel()
        first, last = block.start // columns, -(-stop // columns)
        total = None
        for left, right, scale in factors:
            rows = [(part[first:last], power[first:last]) for part, power in left]
            product = exact_product(rows, right)
            if product is not None:
                part = product * scale
                total = part if total is None else total + part
        if total is None:
            return weight
        delta = total.reshape(-1)[block.start - first * columns : stop - first * columns]
        return weight.add_(delta.to(weight.dtype))

    return combine


LORA = Builder("lora", 1, _lora, streamed=1, scratch=8)
