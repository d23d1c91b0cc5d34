"""What several merge methods share: parameters, and steps on float32 scalars and blocks."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from kittybuild.builders.base import Job
from kittybuild.model.method import Param

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

WEIGHT = Param("weight", float, "input", "how much of this model", required=True)
INT8_MASK = Param("int8_mask", bool, "shared", "only saves memory in mergekit", default=False, accepted=True)


def as_float32(value: float) -> float:
    """`value` rounded to float32, as a Python float; too large becomes infinite."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def rounding(job: Job) -> Callable[[float], float]:
    """How a scalar is rounded to the working dtype of `job`."""
    return float if job.double else as_float32


def rounded_weights(job: Job) -> list[float]:
    """The weights of the models, rounded to the working dtype."""
    round_to = rounding(job)
    return [round_to(weight) for weight in job.params["weight"]]


def scaled(array: Array, factor: float) -> Array:
    """`array` * `factor` in place; one IEEE product an element (by 1 it is the identity)."""
    if factor != 1.0:
        array *= factor
    return array


def divide(array: Array, divisor: float) -> Array:
    """`array` / `divisor` in place; one IEEE division an element (by 1 it is the identity)."""
    if divisor != 1.0:
        array /= divisor
    return array
