"""LoRA: a weight plus the weighted products of adapter factors, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.numerics import exact_product, exact_slices, tree_sums

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def _lora(job: Job) -> Combine:
    """W + sum over adapters of scale * (B A), in kitty-1: exact products, float64 sums, one rounding to W's precision.

    Inputs: W [rows, columns], then A [r, in] and B [out, r] of each adapter; sides of a convolution behind the second
    are one with it. Params: `scales` (one per adapter), `transposed` (W is stored [in, out]: the product is
    transposed). Source: Hu et al. 2021, LoRA, section 4.1.
    """
    transposed = job.params["transposed"]
    columns = job.output.numel // max(1, job.output.shape[0])
    factors = []
    for index, scale in enumerate(job.params["scales"]):
        a, b = _flat(job.whole(1 + 2 * index)), _flat(job.whole(2 + 2 * index))
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


def _flat(factor: Array) -> Array:
    return factor.reshape(len(factor), -1)


def _dora(job: Job) -> Combine:
    """W + sum over adapters of weight * difference, where that of an adapter with a magnitude vector m is
    m * (W + scale * B A) / |W + scale * B A| - W, norms by row (Liu et al. 2024, DoRA, section 4.1; PEFT 0.21).

    In float64 on exact products, rounded once. Inputs: W [out, in], then A, B, and m if there is one, of each adapter.
    """
    import numpy as np

    columns = job.output.shape[1]
    adapters, index = [], 1
    for scale, weight, has in zip(*(job.params[key] for key in ("scales", "weights", "magnitudes")), strict=True):
        a, b = job.whole(index), job.whole(index + 1)
        slices = exact_slices(b, len(a), rows=True), exact_slices(a, len(a), rows=False)
        magnitude = job.whole(index + 2).astype(np.float64).reshape(-1) if has else None
        adapters.append((*slices, scale, weight, magnitude))
        index += 3 if has else 2

    def combine(block: Block) -> Array:
        weights = block.inputs[0].reshape(-1, columns).astype(np.float64)
        rows = slice(block.start // columns, block.start // columns + len(weights))
        total = weights.copy()
        for left, right, scale, weight, magnitude in adapters:
            change = exact_product([part[rows] for part in left], right)
            change *= scale
            if magnitude is not None:
                change += weights
                norms: Array = np.sqrt(np.array(tree_sums(change * change)))
                change *= (magnitude[rows] / norms)[:, None]
                change -= weights
            change *= weight
            total += change
        flat: Array = total.reshape(-1)
        return flat

    return combine


def _joined(job: Job) -> Combine:
    """One factor of the sum of several adapters: their As one below the other, each times its scale, or their Bs side
    by side. Params: `side` ("A", "B"), `scales`. A product is rounded once, to the output.
    """
    import numpy as np

    factors = [job.whole(index).astype(np.float64) for index in range(len(job.inputs))]
    if job.params["side"] == "A":
        factors = [factor * scale for factor, scale in zip(factors, job.params["scales"], strict=True)]
    result = np.concatenate(factors, axis=0 if job.params["side"] == "A" else 1).reshape(-1)
    return lambda block: result[block.start : block.start + block.count]


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
DORA = Builder("dora", 1, _dora, streamed=1, scratch=10, rows=True)
JOINED = Builder("lora_joined", 1, _joined, streamed=0, scratch=0)
