"""RAM: what several fine-tunes changed is averaged over them, what only one changed is kept whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.gram import vectors
from kittybuild.builders.merge.common import rounding
from kittybuild.model.method import Method, Param

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

PAPER = "https://arxiv.org/abs/2601.13572"
EPSILON = Param("epsilon", float, "shared", "differences no larger than this are none", default=1e-5, low=0.0)


def _ram(job: Job) -> Combine:
    """base + the mean of those δ_i = x_i - base with |δ_i| > epsilon (Reinforced Agent Merging, 2026; mergekit 0.1.5).

    Inputs: base, then the models in order; without models the base. epsilon, each sum and the quotient are rounded to
    the working dtype.
    """
    import numpy as np

    epsilon = rounding(job)(job.params["epsilon"])

    def combine(block: Block) -> Array:
        base = block.inputs[0]
        total, count, active = np.zeros((3, block.count), base.dtype)
        for delta in vectors(block, based=True):
            np.greater(np.abs(delta, out=active), epsilon, out=active)
            count += active
            total += np.multiply(delta, active, out=delta)  # what is not finite becomes NaN here, and is reported
        total /= np.maximum(count, 1.0, out=count)
        return np.add(base, total, out=base)

    return combine


def _ramplus_tl(job: Job) -> Combine:
    """As RAM, but what only model i changed is multiplied by 1 + r · min(s_i / max(u_i, epsilon), alpha).

    s_i counts the elements of the tensor that model i changed together with others, u_i those that it changed alone.
    The factor is rounded to the working dtype once (Reinforced Agent Merging, 2026, RAM+; mergekit 0.1.5).
    """
    import numpy as np

    round_to = rounding(job)
    epsilon, factors = round_to(job.params["epsilon"]), [round_to(factor) for factor in _factors(job)]

    def combine(block: Block) -> Array:
        base = block.inputs[0]
        total, count, factor, active = np.zeros((4, block.count), base.dtype)
        for delta, own in zip(vectors(block, based=True), factors, strict=True):
            np.greater(np.abs(delta, out=active), epsilon, out=active)
            count += active
            total += np.multiply(delta, active, out=delta)  # what is not finite becomes NaN here, and is reported
            active *= own
            factor += active
        alone = np.equal(count, 1.0, out=active)
        factor *= alone
        factor += np.subtract(1.0, alone, out=alone)
        total *= factor
        total /= np.maximum(count, 1.0, out=count)
        return np.add(base, total, out=base)

    return combine


def _factors(job: Job) -> list[float]:
    """By how much what only one model changed grows, for each model."""
    import numpy as np

    epsilon = rounding(job)(job.params["epsilon"])
    alone: list[int] = []
    shared: list[int] = []
    for block in job.scan():
        changed = [np.abs(delta, out=delta) > epsilon for delta in vectors(block, based=True)]
        alone, shared = alone or [0] * len(changed), shared or [0] * len(changed)
        count = block.inputs[0]
        count.fill(0.0)
        for active in changed:
            count += active
        by_one = count == 1.0
        for index, active in enumerate(changed):
            every, own = int(np.count_nonzero(active)), int(np.count_nonzero(active & by_one))
            alone[index] += own
            shared[index] += every - own
    r, alpha, least = job.params["r"], job.params["alpha"], job.params["epsilon"]
    ratios = [both / max(own, least) if own else 0.0 for own, both in zip(alone, shared, strict=True)]
    return [1.0 + r * min(ratio, alpha) for ratio in ratios]


RAM = Builder(
    "ram",
    1,
    _ram,
    scratch=4,
    method=Method(
        name="ram",
        title="Reinforced Agent Merging",
        paper=PAPER,
        base="required",
        least=0,
        params=(EPSILON,),
        doc="Adds to the base model the mean of the differences from it, element by element over the models that have"
        " one.",
    ),
)
RAMPLUS_TL = Builder(
    "ramplus_tl",
    1,
    _ramplus_tl,
    scratch=5,
    measured=True,
    method=Method(
        name="ramplus_tl",
        title="Reinforced Agent Merging Plus (Tensor-Local)",
        paper=PAPER,
        base="required",
        least=0,
        params=(
            Param("r", float, "shared", "how much more differences weigh that only one model has", default=0.1),
            Param(
                "alpha",
                float,
                "shared",
                "the largest share that counts of what a model changed with others, over what it changed alone",
                default=0.2,
                low=0.0,
            ),
            EPSILON,
        ),
        doc="RAM, where a difference that only one model has weighs the more, the more of that model's others are"
        " shared.",
    ),
)
