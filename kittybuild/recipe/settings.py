"""Parameter values: from scalars, gradients and filters at several levels to one value for one tensor.

Positions `t` run from 0 (first layer of the slice) to 1 (last); the arithmetic is in Python doubles, as the peers' is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kittybuild.errors import RecipeError
from kittybuild.model.method import Param, Scalar
from kittybuild.model.recipe import At, Filtered, Given

PATTERN = "re:"
_LAYERS = re.compile(r"([0-9]{0,9})\.\.([0-9]{0,9})")
_KEYS = ("value", "filter", "layers")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A parameter's value for one tensor, and the place in the recipe it came from (None: the default)."""

    value: Scalar | None
    at: At | None


class Lookup:
    """One parameter with its settings at all levels that count for it, nearest first; asked tensor by tensor.

    `varies`: whether the answer may be another one for another tensor.
    """

    def __init__(self, param: Param, levels: Iterable[Given | None]) -> None:
        self.param = param
        items = [item for given in levels if given for item in given.values if item.value != ()]
        self._items = [(item, taker(item), isinstance(item.value, tuple)) for item in items]
        self.varies = bool(items) and (isinstance(items[0].value, tuple) or not takes_all(items[0]))
        self._found: dict[tuple[int, float], Resolved] = {}
        self._default = None if param.required else Resolved(param.default, None)

    def resolve(self, tensor: str, layer: int | None, t: float) -> Resolved | None:
        """The value for a tensor of that layer at that position: of the first entry that matches, else the default.

        None: the parameter is required and nobody gives it. Raises RecipeError KB106 for a value of the wrong type or
        range.
        """
        for index, (item, takes, gradient) in enumerate(self._items):
            if takes(tensor, layer):
                place = (index, t if gradient else 0.0)
                if place not in self._found:
                    self._found[place] = Resolved(self._value(item, tensor, t), item.at)
                return self._found[place]
        return self._default

    def _value(self, item: Filtered, tensor: str, t: float) -> Scalar:
        value: Scalar
        if isinstance(item.value, tuple):
            value = interpolate(item.value if self.param.kind in (bool, str) else _numbers(item.value), t)
            if self.param.kind is int and isinstance(value, float):
                value = round(value)  # between whole numbers, the nearest
        else:
            value = item.value
        try:
            return self.param.parse(value)
        except ValueError as error:
            message = f"{self.param.name!r} comes out as {value!r} for {tensor}: it {error}"
            raise RecipeError("KB106", message, at=str(item.at)) from error


def interpolate(values: Sequence[Scalar], t: float) -> Scalar:
    """The gradient `values` at `t` in 0..1: linear between neighbours for numbers, the nearest below for the rest."""
    place = t * (len(values) - 1)
    below = int(place)
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return values[below]
    above = min(len(values) - 1, below + 1)
    part = place - below
    return (1 - part) * float(values[below]) + part * float(values[above])


def _numbers(values: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    """YAML reads `1e-4` as text: where all texts of a gradient are numbers, they count as numbers."""
    try:
        return tuple(float(value) if isinstance(value, str) else value for value in values)
    except ValueError:
        return values


def taker(item: Filtered) -> Callable[[str, int | None], bool]:
    """Whether an entry takes a tensor of that name and layer, as a function: it is asked thousands of times."""
    if item.layers is not None:
        start, end = item.layers
        named = taker(replace(item, layers=None))
        return lambda tensor, layer: (
            layer is not None and start <= layer and (end is None or layer < end) and named(tensor, layer)
        )
    text = item.filter
    if text is None or text == "*":
        return lambda tensor, layer: True
    if text.startswith(PATTERN):
        search = re.compile(text[len(PATTERN) :]).search
        return lambda tensor, layer: search(tensor) is not None
    return lambda tensor, layer: text in tensor


def takes_all(item: Filtered) -> bool:
    """Whether an entry has no filter at all."""
    return item.layers is None and (item.filter is None or item.filter == "*")


def unused(given: Given, tensors: Iterable[tuple[str, int | None]]) -> tuple[Filtered, ...]:
    """The entries of `given` that none of these tensors (with their layers) takes: no match, or earlier ones match."""
    if takes_all(given.values[0]):
        return given.values[1:]
    left = dict(enumerate(given.values))
    takers = [taker(item) for item in given.values]
    for tensor, layer in tensors:
        left.pop(next((i for i, takes in enumerate(takers) if takes(tensor, layer)), -1), None)
        if not left:
            break
    return tuple(left.values())


def entries(value: Any) -> list[tuple[tuple[int, ...], Any]]:
    """The entries of a setting as the text gives it (scalar, gradient, filter, or a list of these), each with its way.

    A way is the index in the list, or nothing.
    """
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [((index,), item) for index, item in enumerate(value)]
    return [((), value)]


def parse_entry(item: Any, at: At) -> Filtered:
    """One entry of a setting: a scalar, a gradient, or a value with `filter` or `layers`. Raises ValueError."""
    if not isinstance(item, Mapping):
        return Filtered(_scalars(item), None, at=at)
    if unknown := [key for key in item if key not in _KEYS]:
        raise ValueError(f"a setting has the keys 'value', 'filter' and 'layers', not {unknown[0]!r}")
    if "value" not in item:
        raise ValueError("a filter needs a 'value' beside it")
    return Filtered(_scalars(item["value"]), _filter(item.get("filter")), _layers(item.get("layers")), at)


def scalars(item: Filtered) -> tuple[Scalar, ...]:
    """Every scalar that stands in an entry."""
    return item.value if isinstance(item.value, tuple) else (item.value,)


def _filter(text: Any) -> str | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"a filter is a part of tensor names, not {text!r}: put it in quotes")
    if text.startswith(PATTERN):
        try:
            re.compile(text[len(PATTERN) :])
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{text[len(PATTERN) :]!r} is no pattern: {error}") from None
    return text


def _layers(text: Any) -> tuple[int, int | None] | None:
    if text is None:
        return None
    found = _LAYERS.fullmatch(text) if isinstance(text, str) else None
    if not found or text == "..":
        raise ValueError(f"layers are a range such as 4..12 (the end is not taken), not {text!r}")
    start, end = (int(side) if side else None for side in found.groups())
    if end is not None and (start or 0) >= end:
        raise ValueError(f"the layers {text} are none: the end is not taken")
    return start or 0, end


def _scalars(value: Any) -> Scalar | tuple[Scalar, ...]:
    if isinstance(value, list):
        return tuple(_scalar(item) for item in value)
    return _scalar(value)


def _scalar(value: Any) -> Scalar:
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"a setting is a number, a word, a list or a filter, not {value!r}")
    return value
