"""Weighted sums of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.merge.common import WEIGHT, divide, rounding, scaled
from kittybuild.model.method import Method, Param

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def _linear(job: Job) -> Combine:
    """sum(w_i x_i), divided by sum(w_i) with `normalize`.

    Each product and each sum is rounded once to the working dtype, in the order of the inputs; the weights and their
    sum are rounded to it first (Wortsman et al. 2022, Model soups; the order of mergekit 0.1.5).
    """
    round_to = rounding(job)
    weights = [round_to(weight) for weight in job.params["weight"]]
    total = 0.0
    for weight in weights:
        total = round_to(total + weight)

    def combine(block: Block) -> Array:
        result = None
        for weight, tensor in zip(weights, block.inputs, strict=True):
            part = scaled(tensor, weight)
            if result is None:
                result = part
            else:
                result += part
        assert result is not None  # a merge has an input
        return divide(result, total) if job.params["normalize"] else result

    return combine


LINEAR = Builder(
    "linear",
    1,
    _linear,
    scratch=0,
    method=Method(
        name="linear",
        title="Linear",
        paper="https://arxiv.org/abs/2203.05482",
        base="ordinary",
        params=(
            WEIGHT,
            Param("normalize", bool, "shared", "divide by the sum of the weights", default=True),
        ),
        doc="The weighted sum of the models, with `normalize` their weighted mean.",
    ),
)
