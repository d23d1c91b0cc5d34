"""The family of task arithmetic: base + λ · a mix of the models' differences from it, each made sparse and rescaled.

A method is a sparsifier, a consensus, and defaults of its own for two parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import BLOCK, Block, Builder, Combine, Job
from kittybuild.builders.merge.common import INT8_MASK, WEIGHT, rounded_weights, rounding, scaled
from kittybuild.builders.merge.consensus import Consensus, elected, summed
from kittybuild.builders.merge.rescale import needs_probabilities, rescale_param, rescaled
from kittybuild.builders.merge.sparsify import (
    Sparsifier,
    by_chance,
    by_magnitude,
    by_rank,
    dense,
    row_width,
    without_outliers,
)
from kittybuild.model.method import Method, Param, no_complaint

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

UNUSED_DENSITY = Param("density", float, "input", "has no effect here", default=1.0, accepted=True)
DENSITY = Param("density", float, "input", "the share of each difference that is kept", default=1.0, low=0.0)
LAMBDA = Param("lambda", float, "shared", "multiply the mixed difference by this", default=1.0)
GAMMA = Param(
    "gamma",
    float,
    "input",
    "the share of each difference, its largest magnitudes, that is left out",
    default=0.01,
    low=0.0,
    high=1.0,
)
EPSILON = Param(
    "epsilon",
    float,
    "input",
    "how far below and above the density the probabilities of a row's least and largest magnitude lie",
    default=0.15,
    low=0.0,
    high=0.5,
)


def normalize_param(default: bool) -> Param:
    """Whether the mix is a mean."""
    return Param("normalize", bool, "shared", "divide by the sum of the weights", default=default)


def needs_room(params: Mapping[str, Any]) -> str | None:
    """The complaint where the density and epsilon of a model give no probabilities."""
    for density, epsilon in zip(params["density"], params["epsilon"], strict=True):
        if 0 < density < 1 and (density - epsilon <= 0 or density + epsilon >= 1):
            return (
                f"density {density:g} and epsilon {epsilon:g} give probabilities from {density - epsilon:g} to"
                f" {density + epsilon:g}: both must lie between 0 and 1"
            )
    return None


def _prepare(job: Job, sparsifier: Sparsifier, consensus: Consensus, rows: bool) -> Combine:
    """base + λ · mix of the w_i · rescale(trim(x_i - base)) (Ilharco et al. 2022; mergekit 0.1.5).

    Inputs: base, then the models in order; without models the base. Every step is rounded once to the working dtype,
    and so are weights, factors and λ before.
    """
    factor, mix, weights = rounding(job)(job.params["lambda"]), consensus(job), rounded_weights(job)
    trims = rescaled(job, sparsifier(job), row_width(job.output) if rows else BLOCK)

    def combine(block: Block) -> Array:
        base, *models = block.inputs
        if not models:
            return base
        parts = []
        for model, trim, weight in zip(models, trims, weights, strict=True):
            model -= base
            parts.append(scaled(trim(model, block.start), weight))
        base += scaled(mix(lambda: parts), factor)
        return base

    return combine


def _builder(
    method: Method, sparsifier: Sparsifier, consensus: Consensus, scratch: int, measured: bool = True
) -> Builder:
    seeded, rows = sparsifier in (by_chance, by_rank), sparsifier is by_rank
    prepare = partial(_prepare, sparsifier=sparsifier, consensus=consensus, rows=rows)
    method = replace(method, random=seeded)
    return Builder(method.name, 1, prepare, scratch=scratch, measured=measured, rows=rows, seeded=seeded, method=method)


def _method(
    name: str,
    title: str,
    paper: str,
    doc: str,
    sparse: tuple[Param, ...],
    *,
    normalize: bool,
    rescale: Param,
    check: Callable[[Mapping[str, Any]], str | None] = no_complaint,
) -> Method:
    params = (WEIGHT, *sparse, normalize_param(normalize), LAMBDA, INT8_MASK, rescale)
    return Method(name, title, f"https://arxiv.org/abs/{paper}", params, "required", least=0, doc=doc, check=check)


TASK_ARITHMETIC = _builder(
    _method(
        "task_arithmetic",
        "Task Arithmetic",
        "2212.04089",
        "Adds the weighted differences of the models from the base to it.",
        (UNUSED_DENSITY,),
        normalize=False,
        rescale=rescale_param("none", accepted=True),
    ),
    dense,
    summed,
    scratch=0,
    measured=False,
)
TIES = _builder(
    _method(
        "ties",
        "TIES",
        "2306.01708",
        "Keeps the largest magnitudes of each difference, elects a sign for each element, and adds the mean of those"
        " that have it.",
        (DENSITY,),
        normalize=True,
        rescale=rescale_param("none"),
        check=needs_probabilities,
    ),
    by_magnitude,
    elected,
    scratch=4,
)
DARE_TIES = _builder(
    _method(
        "dare_ties",
        "DARE TIES",
        "2311.03099",
        "Keeps elements of each difference by chance, rescales them, and adds those that have the elected sign.",
        (DENSITY,),
        normalize=False,
        rescale=rescale_param("l1"),
    ),
    by_chance,
    elected,
    scratch=4,
)
DARE_LINEAR = _builder(
    _method(
        "dare_linear",
        "Linear DARE",
        "2311.03099",
        "Keeps elements of each difference by chance, rescales them, and adds them.",
        (DENSITY,),
        normalize=False,
        rescale=rescale_param("l1"),
    ),
    by_chance,
    summed,
    scratch=3,
)
BREADCRUMBS = _builder(
    _method(
        "breadcrumbs",
        "Model Breadcrumbs",
        "2312.06795",
        "Leaves out the largest and the least magnitudes of each difference, and adds what is between.",
        (DENSITY, GAMMA),
        normalize=False,
        rescale=rescale_param("none"),
        check=needs_probabilities,
    ),
    without_outliers,
    summed,
    scratch=3,
)
BREADCRUMBS_TIES = _builder(
    _method(
        "breadcrumbs_ties",
        "Model Breadcrumbs with TIES",
        "2312.06795",
        "Leaves out the largest and the least magnitudes of each difference, and adds what is between where it has the"
        " elected sign.",
        (DENSITY, GAMMA),
        normalize=False,
        rescale=rescale_param("none"),
        check=needs_probabilities,
    ),
    without_outliers,
    elected,
    scratch=4,
)
DELLA = _builder(
    _method(
        "della",
        "DELLA",
        "2406.11617",
        "Keeps elements of each difference by chance, the more likely the larger they are in their row, rescales them,"
        " and adds the mean of those that have the elected sign.",
        (DENSITY, EPSILON),
        normalize=True,
        rescale=rescale_param("l1"),
        check=needs_room,
    ),
    by_rank,
    elected,
    scratch=6,
)
DELLA_LINEAR = _builder(
    _method(
        "della_linear",
        "Linear DELLA",
        "2406.11617",
        "Keeps elements of each difference by chance, the more likely the larger they are in their row, rescales them,"
        " and adds them.",
        (DENSITY, EPSILON),
        normalize=False,
        rescale=rescale_param("l1"),
        check=needs_room,
    ),
    by_rank,
    summed,
    scratch=6,
)
FAMILY = (TASK_ARITHMETIC, TIES, DARE_TIES, DARE_LINEAR, BREADCRUMBS, BREADCRUMBS_TIES, DELLA, DELLA_LINEAR)
