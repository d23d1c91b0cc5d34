"""What the kept part of a difference is multiplied by, so that it weighs as much as the whole did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import BLOCK, Job
from kittybuild.builders.merge.common import divide, rounding, scaled
from kittybuild.builders.merge.sparsify import Trim, nothing, whole
from kittybuild.builders.norms import norm
from kittybuild.builders.threshold import as_bits, masked
from kittybuild.model.method import Param

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

NORMS = ("l1", "l2", "linf")
FORMS = ("none", *NORMS, "density", "probability")
FAINT = 1e-7
ROOM = 1 << 25
"""Bytes in which what is kept of one difference is remembered, a bit an element."""


def rescale_param(default: str, *, accepted: bool = False) -> Param:
    """The parameter; `true` and `false` are mergekit's words for `l1` and `none`."""
    doc = (
        "has no effect here"
        if accepted
        else "give the kept part of each difference the norm of the whole (`l1`, `l2`, `linf`; `true` is `l1`), divide"
        " it by the density, or each element by its own probability"
    )
    return Param(
        "rescale", str, "shared", doc, default=default, accepted=accepted, choices=FORMS, booleans=("none", "l1")
    )


def rescaled(job: Job, trims: Sequence[Trim], leaf: int = BLOCK) -> Sequence[Trim]:
    """The Trims, each followed by what `rescale` says; `leaf`: see norms.

    (Those that know probabilities divide by them on their own; a method that keeps everything has no such parameter.)
    """
    form, round_to = job.params.get("rescale"), rounding(job)
    if form in NORMS:
        return _by_norms(job, trims, leaf)
    if form == "density":
        densities = [round_to(density) if 0 < density < 1 else 1.0 for density in job.params["density"]]
        return [_then(trim, divide, density) for trim, density in zip(trims, densities, strict=True)]
    return trims


def _then(trim: Trim, step: Callable[[Array, float], Array], number: float) -> Trim:
    return lambda delta, start: step(trim(delta, start), number)


def _by_norms(job: Job, trims: Sequence[Trim], leaf: int) -> Sequence[Trim]:
    """Each multiplied by the norm of the whole over that of what is kept; by 1 where one of them is below 1e-7
    (mergekit 0.1.5).

    One pass for all models; none where all are kept whole or not at all.
    """
    form, round_to = job.params["rescale"], rounding(job)
    masks = {index: _Remembered(trim) for index, trim in enumerate(trims) if trim not in (whole, nothing)}
    norms = {index: (norm(form, leaf), norm(form, leaf)) for index in masks}
    for block in job.scan() if masks else ():
        base, *models = block.inputs
        for index, (of_whole, of_kept) in norms.items():
            delta = models[index]
            delta -= base
            of_whole.add(delta)
            of_kept.add(masks[index].first(delta, block.start))
    result = list(trims)
    for index, pair in norms.items():
        before, after = (each.value() for each in pair)
        factor = before / after if min(before, after) >= FAINT else 1.0
        result[index] = _then(masks[index].again, scaled, round_to(factor))
    return result


class _Remembered:
    """A Trim that is asked once for each block, as long as there is room for what it kept."""

    def __init__(self, trim: Trim) -> None:
        self._trim, self._room = trim, ROOM
        self._kept: dict[tuple[int, int], Array] = {}

    def first(self, delta: Array, start: int) -> Array:
        """As the Trim."""
        import numpy as np

        delta = self._trim(delta, start)
        self._room -= len(delta) // 8 + 1
        if self._room >= 0:
            self._kept[start, len(delta)] = np.packbits(as_bits(delta) != 0)
        return delta

    def again(self, delta: Array, start: int) -> Array:
        """As the Trim."""
        import numpy as np

        kept = self._kept.get((start, len(delta)))
        if kept is None:
            return self._trim(delta, start)
        return masked(delta, np.unpackbits(kept, count=len(delta)))


def needs_probabilities(params: Mapping[str, Any]) -> str | None:
    """The complaint where a method without probabilities is to divide by them."""
    if params["rescale"] != "probability":
        return None
    return "`rescale: probability` is for elements that are kept by chance: choose another form, or dare or della"
