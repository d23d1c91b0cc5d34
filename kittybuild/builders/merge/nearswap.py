"""The other model where it is near to the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.merge.common import rounding
from kittybuild.model.method import Method, Param

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

NEAREST = 1e-6


def _nearswap(job: Job) -> Combine:
    """k · other + (1 - k) · base with k = t / |base - other|, at most 1; a distance below 1e-6 counts as that much.

    Inputs: base, other. Each step is rounded once to the working dtype (alchemonaut 2024; mergekit 0.1.5).
    """
    import numpy as np

    round_to = rounding(job)
    reach, nearest = round_to(job.params["t"]), round_to(NEAREST)

    def combine(block: Block) -> Array:
        base, other = block.inputs
        share = base - other
        np.abs(share, out=share)
        np.maximum(share, nearest, out=share)
        np.divide(reach, share, out=share)
        np.minimum(share, 1.0, out=share)
        other *= share
        base *= np.subtract(1.0, share, out=share)
        return np.add(base, other, out=base)

    return combine


NEARSWAP = Builder(
    "nearswap",
    1,
    _nearswap,
    scratch=1,
    method=Method(
        name="nearswap",
        title="NearSwap",
        paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        base="required",
        most=1,
        params=(
            Param(
                "t", float, "shared", "what is no farther from the base than this is replaced", required=True, low=0.0
            ),
        ),
        doc="Takes the other model's elements where they are close to the base's, and the less of them the farther.",
    ),
)
