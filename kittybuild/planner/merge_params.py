"""The parameters of a merge, resolved for each tensor, with the place that each value came from.

Where nothing varies from tensor to tensor, a part's parameters are resolved once and shared by all of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kittybuild.errors import RecipeError
from kittybuild.model.method import Method, Param, Scalar
from kittybuild.model.recipe import At, MergeStage, Parameters
from kittybuild.planner.parts import Findings, Part, Row
from kittybuild.planner.peers import Rules
from kittybuild.recipe.settings import Lookup, Resolved

SMALL = 1e-3
"""Of the weights' magnitudes: a sum below this share of them makes a division by it a multiplication by thousands."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A resolved parameter: whose (None: of all models), its value, and where it stands (None: the default)."""

    name: str
    model: str | None
    value: Scalar | None
    at: At | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """One parameter of one source (None: of all)."""

    lookup: Lookup
    source: int | None


class PartParams:
    """The parameters of one part. What is wrong with them is noted once, not for each tensor."""

    def __init__(self, stage: MergeStage, part: Part, rules: Rules, findings: Findings) -> None:
        self.stage, self.part, self.findings = stage, part, findings
        self._plain = rules.as_listed.get(part.method.name)
        self.inputs = tuple(index for index in range(len(part.sources)) if index != part.base)
        params = [param for param in part.method.params if not param.accepted]
        self._asked = [(param, self._questions(param)) for param in params]
        self._varies = any(asked.lookup.varies for _, several in self._asked for asked in several)
        self._same: dict[str, Any] | None = None
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._told: set[tuple[str, str, str]] = set()
        self._doubts: set[str] = set()
        self._active: dict[int, set[str]] = {index: set() for index in self.inputs}

    def _questions(self, param: Param) -> list[_Asked]:
        levels = [given.get(param.name) for given in (self.part.slice.parameters, self.stage.parameters)]
        common = Lookup(param, levels)
        if param.scope == "shared":
            return [_Asked(common, None)]
        own = [(i, self.part.sources[i].parameters.get(param.name)) for i in self.inputs]
        return [_Asked(Lookup(param, [given, *levels]) if given else common, i) for i, given in own]

    def of(self, row: Row, taking: Collection[int]) -> dict[str, Any]:
        """The parameters of a tensor by name: a list with a value for each of `inputs` that is taken, or one value.

        With an optional base also `base`: whether the first input is one.
        """
        found = self._same or self._resolved(row)
        if len(taking) == len(self.part.sources):
            return dict(found)
        return {
            name: [each for i, each in zip(self.inputs, value, strict=True) if i in taking]
            if isinstance(value, list)
            else value
            for name, value in found.items()
        }

    def _resolved(self, row: Row) -> dict[str, Any]:
        """As `of`, for all inputs. Tensors with equal parameters share them."""
        values = [self._values(param, several, row) for param, several in self._asked]
        key = tuple(map(tuple, values))
        if key not in self._known:
            by_name = zip(self._asked, values, strict=True)
            found = {p.name: several if p.scope == "input" else several[0] for (p, _), several in by_name}
            if self.part.method.base == "optional":
                as_listed = self._plain is not None and found[self._plain] is not None
                found["base"] = self.part.base is not None and not as_listed
            self._look_at(found, row)
            self._known[key] = found
        if not self._varies:
            self._same = self._known[key]
        return self._known[key]

    def _values(self, param: Param, several: list[_Asked], row: Row) -> list[Scalar | None]:
        """A parameter of all sources; those without settings of their own are asked once where names are the same."""
        values: list[Scalar | None] = []
        last: tuple[Lookup, str] | None = None
        for asked in several:
            tensor, layer = self._spot(asked.source, row)
            if last == (asked.lookup, tensor) and values[-1] is not None:
                values.append(values[-1])
                continue
            last = (asked.lookup, tensor)
            try:
                found = asked.lookup.resolve(tensor, layer, row.t)
            except RecipeError as error:
                self._tell(error, param.name)
                found = Resolved(param.default, None)
            if found is None:
                self._tell(self._not_given(param, asked.source, tensor), param.name)
            values.append(found.value if found else None)
        return values

    def _spot(self, source: int | None, row: Row) -> tuple[str, int | None]:
        """The name and the layer by which a source's parameters (None: shared ones) are looked up."""
        if source is None:
            return row.name, row.layer
        return row.names[source], None if row.index is None else self.part.starts[source] + row.index

    def origins(self, row: Row) -> tuple[Origin, ...]:
        """The parameters of a tensor, each with where it came from."""
        found = []
        for param, several in self._asked:
            for asked in several:
                model = None if asked.source is None else self.part.named(asked.source)
                resolved = asked.lookup.resolve(*self._spot(asked.source, row), row.t) or Resolved(None, None)
                found.append(Origin(param.name, model, resolved.value, resolved.at))
        return tuple(found)

    def idle(self) -> dict[int, str]:
        """The inputs that took no part in any tensor so far, each with the parameter that was zero everywhere."""
        names = [param.name for param, _ in self._asked if param.scope == "input"]
        return {
            index: next(name for name in ("weight", "density") if name in names and name not in active)
            for index, active in self._active.items()
            if "weight" in names and not active >= {"weight", "density"} & set(names)
        }

    def _not_given(self, param: Param, source: int | None, tensor: str) -> RecipeError:
        method, stage, part = self.part.method, self.stage, self.part
        use = None if source is None else part.sources[source]
        message = f"{method.name} needs the parameter {param.name!r}" + (f" of {use.model}" if use else "")
        levels: list[Parameters] = [part.slice.parameters, stage.parameters]
        levels += [use.parameters] if use else []
        if any(param.name in given for given in levels):
            hint = f"no filter takes {tensor}: add an entry without one"
        elif use and use not in stage.models and not stage.slices:
            hint = f"base_model is merged like the others: list it with its {param.name}, or leave it out"
        else:
            hint = f"add `{param.name}:` under `parameters:`"
        return RecipeError("KB115", message, at=str(use.at if use else stage.at), hint=hint)

    def _tell(self, error: RecipeError, what: str) -> None:
        """Note a problem of a parameter, once for all tensors."""
        if (error.code, str(error.at), what) not in self._told:
            self._told.add((error.code, str(error.at), what))
            self.findings.problems.append(error)

    def _look_at(self, found: Mapping[str, Any], row: Row) -> None:
        """Note what the method has to say of resolved parameters, and what follows from weights."""
        method = self.part.method
        if any(value is None for param, _ in self._asked if param.required for value in _each(found[param.name])):
            return  # what is missing is noted already
        if complaint := method.check(found):
            message, hint = f"{method.name}, for {row.name}: {complaint}", f"see `kittybuild methods {method.name}`"
            self._tell(RecipeError("KB116", message, at=str(self._place(complaint, row)), hint=hint), complaint)
        if (doubt := doubtful(method, found)) and doubt[0] not in self._doubts:
            self._doubts.add(doubt[0])
            self.findings.notes.append(f"{self.part.slice.at}: {doubt[1]} (so for {row.name})")
        for name in ("weight", "density"):
            for index, value in zip(self.inputs, _each(found.get(name, ())), strict=False):
                if value != 0:  # None: there is none to be zero
                    self._active[index].add(name)

    def _place(self, complaint: str, row: Row) -> At:
        """Where a parameter that a complaint names was given, else the place of the part."""
        named = set(re.findall(r"\w+", complaint))
        given = (origin.at for origin in self.origins(row) if origin.at and origin.name in named)
        return next(given, self.part.slice.at)


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def doubtful(method: Method, params: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a person should know of weights whose sum a method divides by: the kind of doubt, and a sentence."""
    weights = params.get("weight")
    divides = params.get("normalize", params.get("normalize_weights", method.name in ("slerp", "nuslerp")))
    if not divides or not isinstance(weights, list) or not weights or None in weights:
        return None
    shown, total = ", ".join(f"{weight:g}" for weight in weights), sum(weights)
    if abs(total) <= SMALL * sum(map(abs, weights)):
        return "small", f"{method.name} divides by the sum of the weights, and that of {shown} is {total:g}"
    if min(weights) < 0:
        return "negative", f"{method.name} divides by the sum of the weights, and of {shown} not all are positive"
    return None
