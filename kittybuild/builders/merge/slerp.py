"""Spherical interpolation between two models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.merge.common import rounding
from kittybuild.builders.numerics import arc_cosine_weights, dots
from kittybuild.model.method import Method, Param

if TYPE_CHECKING:
    from torch import Tensor

COLINEAR = 0.9995
TINY = 1e-8


def _slerp(job: Job) -> Combine:
    """sin((1-t)θ)/sin θ · base + sin(tθ)/sin θ · other, θ the angle between the flattened tensors; linear if colinear.

    Inputs: base, other. Norms at or below 1e-8 count as 1 and |cos θ| > 0.9995 as colinear (mergekit 0.1.5;
    Shoemake 1985). Sums in float64 (portable tree); the two factors are rounded to the working dtype once.
    """
    t = job.params["t"]
    sums = [0.0, 0.0, 0.0]
    for block in job.scan():
        for leaf in dots(block.inputs, ((0, 0), (1, 1), (0, 1))):
            sums = [total + part for total, part in zip(sums, leaf, strict=True)]
    norms = [norm if norm > TINY else 1.0 for norm in map(math.sqrt, sums[:2])]
    cosine = sums[2] / (norms[0] * norms[1])
    near, far = (1.0 - t, t) if not abs(cosine) <= COLINEAR else arc_cosine_weights(cosine, t)
    round_to = rounding(job)
    near, far = round_to(near), round_to(far)

    def combine(block: Block) -> Tensor:
        base, other = block.inputs
        return base.mul_(near).add_(other.mul_(far))

    return combine


SLERP = Builder(
    "slerp",
    1,
    _slerp,
    scratch=10,
    measured=True,
    method=Method(
        name="slerp",
        title="SLERP",
        paper="https://en.wikipedia.org/wiki/Slerp",
        base="required",
        most=1,
        params=(Param("t", float, "shared", "0 is the base model, 1 the other", required=True),),
    ),
)
