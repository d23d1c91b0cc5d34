"""LoRA: a weight plus the weighted products of adapter factors, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.numerics import exact_product, exact_slices

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def _lora(job: Job) -> Combine:
    """W + sum over adapters of scale * (B A), in kitty-1: exact products, float64 sums, one rounding to W's precision.

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

    def combine(block: Block) -> Array:
        weight = block.inputs[0]
        done = 0
        for rows, across in _rectangles(block.start, block.start + block.count, columns):
            total: Array | None = None
            for left, right, scale in factors:
                part = exact_product([s[rows] for s in left], [s[:, across] for s in right])
                part *= scale
                if total is None:
                    total = part
                else:
                    total += part
            if total is not None:
                piece, flat = weight[done : done + total.size], total.reshape(-1)
                flat += piece
                piece[:] = flat
                done += total.size
        return weight

    return combine


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """The rows and columns of the elements [start, stop), as at most three rectangles, in order."""
    while start < stop:
        row, column = divmod(start, columns)
        last = stop // columns
        if column == 0 and last > row:
            yield slice(row, last), slice(0, columns)
            start = last * columns
        else:
            end = min(columns, stop - row * columns)
            yield slice(row, row + 1), slice(column, end)
            start = row * columns + end


LORA = Builder("lora", 1, _lora, streamed=1, scratch=8)
