"""Task arithmetic and TIES, but only where enough models agree that the mix resembles their own difference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from kittybuild.builders.base import Block, Builder, Combine, Job
from kittybuild.builders.merge.common import INT8_MASK, WEIGHT, rounded_weights, rounding, scaled
from kittybuild.builders.merge.consensus import Consensus, elected, summed
from kittybuild.builders.merge.rescale import needs_probabilities, rescale_param, rescaled
from kittybuild.builders.merge.sparsify import Sparsifier, by_magnitude, dense
from kittybuild.builders.merge.task_arithmetic import DENSITY, UNUSED_DENSITY, normalize_param
from kittybuild.model.method import Method, Param

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

PAPER = "https://arxiv.org/abs/2405.07813"
LAMBDA = Param(
    "lambda",
    float,
    "input",
    "a model votes for an element where its difference is larger than so many times what the mix lies away from it",
    default=1.0,
    low=0.0,
)
VOTES = Param("k", int, "shared", "how many models must vote for an element", default=1, low=0)


def _prepare(job: Job, sparsifier: Sparsifier, consensus: Consensus) -> Combine:
    """base + mix, where at least k models have |δ_i| > λ_i · |mix - δ_i|, else base; δ_i = x_i - base as it is, mix
    that of the w_i · rescale(trim(δ_i)) (Wang et al. 2024, Localizing Task Information; mergekitty 0.3).

    Inputs: base, then the models in order; without models the base. Every step is rounded once to the working dtype.
    """
    import numpy as np

    mix, weights, least = consensus(job), rounded_weights(job), job.params["k"]
    trims = rescaled(job, sparsifier(job))
    factors = [rounding(job)(factor) for factor in job.params["lambda"]]

    def combine(block: Block) -> Array:
        base, *deltas = block.inputs
        if not deltas:
            return base
        for delta in deltas:
            delta -= base

        def parts() -> Iterator[Array]:
            for delta, trim, weight in zip(deltas, trims, weights, strict=True):
                yield scaled(trim(delta.copy(), block.start), weight)

        mixed, votes = mix(parts), np.zeros(block.count, dtype=np.int32)
        for delta, factor in zip(deltas, factors, strict=True):
            apart = mixed - delta
            votes += abs(delta) > scaled(np.abs(apart, out=apart), factor)
        mixed *= votes >= least  # what is not finite becomes NaN here, and is reported
        base += mixed
        return base

    return combine


CONSENSUS_TA = Builder(
    "consensus_ta",
    1,
    partial(_prepare, sparsifier=dense, consensus=summed),
    scratch=5,
    method=Method(
        "consensus_ta",
        "Consensus Task Arithmetic",
        PAPER,
        (
            WEIGHT,
            UNUSED_DENSITY,
            VOTES,
            LAMBDA,
            normalize_param(False),
            INT8_MASK,
            rescale_param("none", accepted=True),
        ),
        "required",
        least=0,
        doc="Adds the weighted differences of the models where enough of them are close to that sum.",
    ),
)
CONSENSUS_TIES = Builder(
    "consensus_ties",
    1,
    partial(_prepare, sparsifier=by_magnitude, consensus=elected),
    scratch=7,
    measured=True,
    method=Method(
        "consensus_ties",
        "Consensus TIES",
        PAPER,
        (WEIGHT, DENSITY, VOTES, LAMBDA, normalize_param(True), INT8_MASK, rescale_param("none")),
        "required",
        least=0,
        doc="Adds what TIES adds where enough of the models are close to it.",
        check=needs_probabilities,
    ),
)
