"""Matrices of experts that are changed: noise added, then a factor. And the biases that a dense model lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.normals import normals
from kittybuild.builders.random import Draws

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array


def _expert(job: Job) -> Combine:
    """(W + noise * z) * factor, z standard normal. Params: `noise`, `factor`; with noise, `seed` and `tensor`."""
    noise, factor = job.params["noise"], job.params["factor"]
    draws = Draws(job.params["seed"], job.params["tensor"], 0) if noise else None

    def combine(block: Block) -> Array:
        weight = block.inputs[0]
        if draws:
            drawn = normals(draws, block.start, block.count)
            drawn *= noise
            weight += drawn.astype(weight.dtype)
        weight *= weight.dtype.type(factor)
        return weight

    return combine


EXPERT = Builder("expert", 1, _expert, scratch=12)
