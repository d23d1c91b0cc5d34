"""Sums of differences from a base: task arithmetic, and TIES with trimming and sign election."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from kittybuild.builders.base import BLOCK, Block, Builder, Combine, Job
from kittybuild.builders.merge.common import INT8_MASK, WEIGHT, divide, rounding
from kittybuild.builders.numerics import tree_sums
from kittybuild.builders.selection import EVERYTHING, NOTHING, Threshold, kept, largest
from kittybuild.model.method import Method, Param

if TYPE_CHECKING:
    from torch import Tensor

ZERO = 1e-8
FAINT = 1e-7


def _task_arithmetic(job: Job) -> Combine:
    """base + λ · Σ w_i (x_i - base), the sum divided by Σ w_i with `normalize` (Ilharco et al. 2022, mergekit 0.1.5).

    Inputs: base, then the models in order. A divisor below 1e-8 counts as 1.
    """
    round_to = rounding(job)
    weights = [round_to(weight) for weight in job.params["weight"]]
    total = 0.0
    for weight in weights:
        total = round_to(total + weight)
    total = 1.0 if abs(total) < ZERO else total

    def combine(block: Block) -> Tensor:
        base, *models = block.inputs
        mixed = None
        for weight, model in zip(weights, models, strict=True):
            part = model.sub_(base).mul_(weight)
            mixed = part if mixed is None else mixed.add_(part)
        if mixed is None:
            return base
        if job.params["normalize"]:
            mixed = divide(mixed, total)
        return base.add_(_scaled(mixed, round_to(job.params["lambda"])))

    return combine


def _scaled(mixed: Tensor, factor: float) -> Tensor:
    return mixed if factor == 1.0 else mixed.mul_(factor)


def _ties(job: Job) -> Combine:
    """base + λ · the mean of those trimmed, weighted differences whose sign the sum of all has (Yadav et al. 2023).

    Trimming keeps the int(density · n) largest magnitudes of each difference, at least one where density > 0; among
    equals the lowest index is kept. A sum of zero elects plus; zeros agree with nobody; with `normalize` the divisor
    is the sum of the weights that agree, 0 counting as 1; with `rescale` each trimmed difference gets its L1 norm back
    (mergekit 0.1.5, save the order of equals).
    """
    round_to = rounding(job)
    weights = [round_to(weight) for weight in job.params["weight"]]
    counts = [kept(job.output.numel, density) for density in job.params["density"]]
    thresholds = largest(lambda which: _magnitudes(job, which), job.output.numel, counts, double=job.double)
    factors = _l1_factors(job, thresholds) if job.params["rescale"] else [1.0] * len(weights)

    def combine(block: Block) -> Tensor:
        base, *models = block.inputs
        if not models:
            return base
        deltas = []
        for weight, threshold, factor, model in zip(weights, thresholds, factors, models, strict=True):
            trimmed = threshold.trim(model.sub_(base), block.start)
            deltas.append(_scaled(trimmed, round_to(factor)).mul_(weight))
        mixed = _agreed(deltas, weights, normalize=job.params["normalize"])
        return base.add_(_scaled(mixed, round_to(job.params["lambda"])))

    return combine


def _l1_factors(job: Job, thresholds: Sequence[Threshold]) -> list[float]:
    """The L1 norm of each difference over that of what is kept of it; 1 where one of them is below 1e-7."""
    norms = {i: [0.0, 0.0] for i, threshold in enumerate(thresholds) if threshold not in (EVERYTHING, NOTHING)}
    for block in job.scan() if norms else ():
        base, *models = block.inputs
        for index, norm in norms.items():
            whole = models[index].sub_(base)
            for side, part in enumerate((whole, thresholds[index].trim(whole.clone(), block.start))):
                for start in range(0, part.numel(), BLOCK):
                    norm[side] += tree_sums(part[start : start + BLOCK].abs().double()[None])[0]
    factors = {i: whole / trimmed if min(whole, trimmed) >= FAINT else 1.0 for i, (whole, trimmed) in norms.items()}
    return [factors.get(index, 1.0) for index in range(len(thresholds))]


def _magnitudes(job: Job, which: Collection[int]) -> Iterator[tuple[int, dict[int, Tensor]]]:
    for block in job.scan():
        base, *models = block.inputs
        yield block.start, {index: models[index].sub_(base).abs_() for index in which}


def _agreed(deltas: list[Tensor], weights: list[float], *, normalize: bool) -> Tensor:
    """The sum of the deltas that have the elected sign, divided by the sum of their weights with `normalize`.

    Every delta is multiplied by that sign (exactly): those that agree are then the positive ones. Steps of floats in
    place, since torch takes ten times as long for those that make or take booleans.
    """
    sign = deltas[0].clone()
    for delta in deltas[1:]:
        sign.add_(delta)
    sign.ge_(0).mul_(2).sub_(1)
    mixed = divisor = None
    for delta, weight in zip(deltas, weights, strict=True):
        part = delta.mul_(sign).clamp_min_(0)
        mixed = part.clone() if mixed is None else mixed.add_(part)
        share = part.gt_(0).mul_(weight)
        divisor = share if divisor is None else divisor.add_(share)
    assert mixed is not None  # there is a delta
    assert divisor is not None
    if normalize:
        mixed.div_(divisor.add_(divisor.clone().eq_(0)))
    return mixed.mul_(sign)


def _shared(normalize: bool) -> tuple[Param, ...]:
    return (
        Param("normalize", bool, "shared", "divide by the sum of the weights", default=normalize),
        Param("lambda", float, "shared", "multiply the mixed difference by this", default=1.0),
        INT8_MASK,
    )


TASK_ARITHMETIC = Builder(
    "task_arithmetic",
    1,
    _task_arithmetic,
    scratch=0,
    method=Method(
        name="task_arithmetic",
        title="Task Arithmetic",
        paper="https://arxiv.org/abs/2212.04089",
        base="required",
        least=0,
        params=(
            WEIGHT,
            Param("density", float, "input", "has no effect here", default=1.0, accepted=True),
            *_shared(False),
            Param("rescale", bool, "shared", "has no effect here", default=False, accepted=True),
        ),
    ),
)
TIES = Builder(
    "ties",
    1,
    _ties,
    scratch=4,
    measured=True,
    method=Method(
        name="ties",
        title="TIES",
        paper="https://arxiv.org/abs/2306.01708",
        base="required",
        least=0,
        params=(
            WEIGHT,
            Param("density", float, "input", "the share of each difference that is kept", default=1.0, low=0.0),
            *_shared(True),
            Param("rescale", bool, "shared", "give each trimmed difference its L1 norm back", default=False),
        ),
    ),
)
