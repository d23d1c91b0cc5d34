"""Parameter values: from scalars, gradients and filters at four levels to one value for one tensor.

Positions `t` run from 0 (first layer of the slice) to 1 (last); the arithmetic is in Python doubles, as the peers' is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from kittybuild.errors import RecipeError
from kittybuild.model.method import Param, Scalar
from kittybuild.model.recipe import At, Filtered, Given, Parameters


@dataclass(frozen=True, slots=True)
class Resolved:
    """A parameter's value for one tensor, and the place in the recipe it came from (None: the default)."""

    value: Scalar | None
    at: At | None


def interpolate(values: Sequence[Scalar], t: float) -> Scalar:
    """The gradient `values` at `t` in 0..1: linear between neighbours for numbers, the nearest below for the rest."""
    place = t * (len(values) - 1)
    below = int(place)
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return values[below]
    above = min(len(values) - 1, below + 1)
    part = place - below
    return (1 - part) * float(values[below]) + part * float(values[above])


def matches(filter_text: str | None, tensor: str) -> bool:
    """Whether a filter takes a tensor: no filter, `*`, or a plain substring of the name."""
    return filter_text is None or filter_text == "*" or filter_text in tensor


def value_for(given: Given, tensor: str, t: float, kind: type = float) -> Scalar | None:
    """What `given` says for `tensor` at `t`: the first filter that matches; None if none does.

    `kind` is the parameter's type: only of a number do the texts of a gradient count as numbers.
    """
    for item in given.values:
        if matches(item.filter, tensor):
            if not isinstance(item.value, tuple):
                return item.value
            values = item.value if kind is bool else _numbers(item.value)
            return interpolate(values, t) if values else None
    return None


def unused(given: Given, tensors: Collection[str]) -> tuple[Filtered, ...]:
    """The values of `given` that none of these tensors takes: no name matches, or earlier ones match first."""
    taken = {next((i for i, item in enumerate(given.values) if matches(item.filter, name)), -1) for name in tensors}
    return tuple(item for i, item in enumerate(given.values) if i not in taken)


def _numbers(values: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    """YAML reads `1e-4` as text: where all texts of a gradient are numbers, they count as numbers."""
    try:
        return tuple(float(value) if isinstance(value, str) else value for value in values)
    except ValueError:
        return values


def resolve(param: Param, scopes: Sequence[tuple[Parameters, str]], t: float) -> Resolved | None:
    """The value of `param` from the first scope (parameters, name to filter by) that gives one, else the default.

    None: it is required and nobody gives it. Raises RecipeError KB106 for a value of the wrong type or range.
    """
    for parameters, tensor in scopes:
        given = parameters.get(param.name)
        value = value_for(given, tensor, t, param.kind) if given else None
        if given and value is not None:
            try:
                return Resolved(param.parse(value), given.at)
            except ValueError as error:
                message = f"{param.name!r} comes out as {value!r} for {tensor}: it {error}"
                raise RecipeError("KB106", message, at=str(given.at)) from error
    return None if param.required else Resolved(param.default, None)


def parse_setting(value: Any, at: At) -> Given:
    """A setting as the text gives it: scalar, gradient, `{value, filter}`, or a list of these. Raises ValueError."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return Given(tuple(_filtered(item) for item in value), at)
    if isinstance(value, Mapping):
        return Given((_filtered(value),), at)
    return Given((Filtered(_scalars(value), None),), at)


def scalars(given: Given) -> tuple[Scalar, ...]:
    """Every scalar that stands in a setting."""
    values = (item.value if isinstance(item.value, tuple) else (item.value,) for item in given.values)
    return tuple(value for several in values for value in several)


def _filtered(item: Any) -> Filtered:
    if not isinstance(item, Mapping):
        return Filtered(_scalars(item), None)
    if unknown := sorted(set(item) - {"value", "filter"}):
        raise ValueError(f"a setting has the keys 'value' and 'filter', not {unknown[0]!r}")
    if "value" not in item:
        raise ValueError("a filter needs a 'value' beside it")
    pattern = item.get("filter")
    if not isinstance(pattern, (str, NoneType)):
        raise ValueError(f"a filter is a part of tensor names, not {pattern!r}: put it in quotes")
    return Filtered(_scalars(item["value"]), pattern)


def _scalars(value: Any) -> Scalar | tuple[Scalar, ...]:
    if isinstance(value, list):
        return tuple(_scalar(item) for item in value)
    return _scalar(value)


def _scalar(value: Any) -> Scalar:
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"a setting is a number, a word, a list or a filter, not {value!r}")
    return value
