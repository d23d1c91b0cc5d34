"""Model Stock: how far to go from the base to the mean of the fine-tunes, by the angles between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.gram import gram, pairs_of, vectors
from kittybuild.builders.numerics import row_dots
from kittybuild.model.method import Method, Param

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

SINGULAR = 1e-6


def _model_stock(job: Job) -> Combine:
    """base + t · mean(δ_i), δ_i = x_i - base, with t = n c / (1 + (n - 1) c) for the mean cosine c of every two δ_i.

    One c for the whole tensor, or with `filter_wise` one for each row (of the last dimension; other tensors are one
    row). The cosine with a zero δ_i is 0; t is 0 where its divisor is below 1e-6 (Jang et al. 2024; mergekit 0.1.5,
    whose cosines of two short δ_i are smaller than they are). Each row is one float64 tree, rows are added in order;
    t is rounded to the working dtype once.
    """
    import numpy as np

    shape, filter_wise = job.output.shape, job.params["filter_wise"]
    width = shape[-1] if shape else 1
    whole = None
    if not filter_wise:
        found = gram(job, based=True, width=width)
        whole = _ratios(np.array([[found[i][j]] for i, j in pairs_of(len(found))]), len(found)) if found else None

    def combine(block: Block) -> Array:
        deltas = vectors(block, based=True)
        count = len(deltas)
        ratios = _ratios(row_dots(deltas, pairs_of(count), width), count) if whole is None else whole
        total = deltas[0]
        for delta in deltas[1:]:
            total += delta
        total /= count
        rows = total.reshape(-1, width)
        rows *= ratios.astype(total.dtype)[:, None]
        return np.add(block.inputs[0], total, out=block.inputs[0])

    return combine


def _ratios(products: Array, count: int) -> Array:
    """t for each column of the dot products of every two of so many vectors, in float64."""
    import numpy as np

    pairs = pairs_of(count)
    squares = {i: row for (i, j), row in zip(pairs, products, strict=True) if i == j}
    total = np.zeros(products.shape[1])
    for (i, j), row in zip(pairs, products, strict=True):
        if i != j:
            scale = np.sqrt(squares[i] * squares[j])
            total += np.where(scale == 0, 0.0, row / scale).clip(-1.0, 1.0)
    cosine = total / (len(pairs) - count)
    divisor = cosine * (count - 1) + 1.0
    return np.where(np.abs(divisor) < SINGULAR, 0.0, cosine * count / divisor)


MODEL_STOCK = Builder(
    "model_stock",
    1,
    _model_stock,
    scratch=11,
    measured=True,
    rows=True,
    method=Method(
        name="model_stock",
        title="Model Stock",
        paper="https://arxiv.org/abs/2403.19522",
        base="required",
        least=2,
        params=(Param("filter_wise", bool, "shared", "one ratio for each row, not one for the tensor", default=False),),
        doc="Goes from the base model towards the mean of its fine-tunes, the farther the more alike they are.",
    ),
)
