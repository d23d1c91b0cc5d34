"""What a merge method asks for: its parameters, its base, how many models it takes. The maths is in builders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter. `scope`: one value per model, or one shared by all. `default` None with `required` False: absent.

    `accepted` marks words of the peers that have no effect here: they are taken with a note. `choices`: the words that
    a parameter of kind str may be; `booleans`: which of them false and true stand for, where they are taken too.
    """

    name: str
    kind: type
    scope: Literal["input", "shared"]
    doc: str
    default: Scalar | None = None
    required: bool = False
    low: float | None = None
    high: float | None = None
    accepted: bool = False
    choices: tuple[str, ...] = ()
    booleans: tuple[str, str] | None = None

    def parse(self, value: Scalar) -> Scalar:
        """`value` as this parameter's type and within its range; raises ValueError with what is wanted."""
        if self.kind is str:
            return self._choice(value)
        parsed = _KINDS[self.kind](value)
        if not isinstance(parsed, str) and (
            (self.low is not None and parsed < self.low) or (self.high is not None and parsed > self.high)
        ):
            raise ValueError(f"must be {self.range_text()}")
        return parsed

    def _choice(self, value: Scalar) -> str:
        if not self.choices or value in self.choices:
            return str(value)
        wanted = f"must be one of {', '.join(self.choices)}"
        if self.booleans is None:
            raise ValueError(wanted)
        try:
            return self.booleans[_as_bool(value)]
        except ValueError:
            raise ValueError(f"{wanted}, or true or false") from None

    def range_text(self) -> str:
        """The range for a person."""
        if self.low is None or self.high is None:
            return f"at most {self.high:g}" if self.low is None else f"at least {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


def _as_float(value: Scalar) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def _as_int(value: Scalar) -> int:
    number = _as_float(value)
    if number != int(number):
        raise ValueError("must be a whole number")
    return int(number)


_TRUE = frozenset({"true", "yes", "on", "1", "t", "y"})
_FALSE = frozenset({"false", "no", "off", "0", "f", "n"})


def _as_bool(value: Scalar) -> bool:
    text = str(value).lower().removesuffix(".0")
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("must be true or false")


_KINDS: Mapping[type, Callable[[Scalar], Scalar]] = MappingProxyType({float: _as_float, int: _as_int, bool: _as_bool})


def no_complaint(params: Mapping[str, Any]) -> None:
    """Any parameters will do."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method as a recipe sees it.

    `base`: "required" (it works on differences from the base), "optional" (on differences where a base is given, else
    on the models themselves) or "ordinary" (a base model is one input among the others). `least` and `most` count the
    models beside such a base; with an ordinary one, all. `doc`: what it does, in a sentence or two. `check`: what is
    wrong with the resolved parameters of one tensor as a whole (a derivation's `params`), None where nothing is.
    `random`: it draws random numbers.
    """

    name: str
    title: str
    paper: str
    params: tuple[Param, ...]
    base: Literal["required", "optional", "ordinary"]
    least: int = 1
    most: int | None = None
    doc: str = ""
    check: Callable[[Mapping[str, Any]], str | None] = no_complaint
    random: bool = False

    def param(self, name: str) -> Param | None:
        """The parameter of that name."""
        return next((param for param in self.params if param.name == name), None)

    def counts_text(self) -> str:
        """How many models it takes, for a person."""
        number = {1: "one", 2: "two", 3: "three"}.get(self.least, str(self.least))
        noun = "model" if self.least == 1 else "models"
        if self.most is None and not self.least:
            text = "any number of models"
        elif self.most is None:
            text = f"at least {number} {noun}"
        elif self.least == self.most:
            text = f"exactly {number} {noun}"
        else:
            text = f"{self.least} to {self.most} models"
        return text if self.base == "ordinary" else f"{text} beside its base model"


def find(methods: Sequence[Method], name: str) -> Method | None:
    """The method of that name."""
    return next((method for method in methods if method.name == name), None)


Catalogue = Mapping[str, tuple[Method, ...]]
"""The merge methods of each class of arithmetic, by its name, in the order of declaration."""
