"""One tensor of a plan, explained: what makes it, from what, with which parameters, and where each of these stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kittybuild.errors import UsageError, nearest
from kittybuild.model.derivation import Derivation, Input, SourceTensor
from kittybuild.model.plan import inputs_of
from kittybuild.model.recipe import ApplyLoraStage, Recipe
from kittybuild.planner.known import Known
from kittybuild.planner.merge_params import Origin

DEFAULT = "the default"


@dataclass(frozen=True, slots=True)
class Explanation:
    """A tensor in one stage. `builder` None: it is taken over as it is. `key` None: an input's content is unknown."""

    stage: str
    tensor: str
    builder: str | None
    version: int | str | None
    numerics: str | None
    output: str
    inputs: tuple[str, ...]
    params: tuple[Origin, ...]
    key: str | None

    def to_json(self) -> dict[str, Any]:
        """As `plan --explain --json` prints it."""
        params = [
            {"name": param.name, "model": param.model, "value": param.value, "at": str(param.at) if param.at else None}
            for param in self.params
        ]
        fields = ("stage", "tensor", "builder", "version", "numerics", "output", "inputs", "key")
        return {name: getattr(self, name) for name in fields} | {"inputs": list(self.inputs), "params": params}

    def lines(self) -> list[str]:
        """As `plan --explain` prints it for a person."""
        made = "taken over as it is" if self.builder is None else f"{self.builder}, version {self.version}"
        rows = [("made by", made), ("numerics", self.numerics), ("output", self.output)]
        rows += [("from", given) for given in self.inputs]
        rows += [(f"{p.name} of {p.model}" if p.model else p.name, f"{_shown(p.value)}    {p.at or DEFAULT}")
                 for p in self.params]  # fmt: skip
        rows += [("key", self.key or "not known yet: the content of an input is not")] if self.builder else []
        return [f"{self.stage}: {self.tensor}", *(f"  {name}: {value}" for name, value in rows if value)]


def explanations(
    known: Known, origins: Mapping[str, Sequence[Origin]], recipe: Recipe, tensor: str
) -> tuple[Explanation, ...]:
    """The tensor of that name in every stage that has it. `origins`: of each merge's parameters for it.

    Raises UsageError KB005 if there is none.
    """
    stages = [stage for stage in known.plan.stages.values() if tensor in stage.steps]
    if not stages:
        names = {name for stage in known.plan.stages.values() for name in stage.steps}
        raise UsageError("KB005", f"no stage makes a tensor {tensor!r}", at=recipe.file, hint=nearest(tensor, names))
    found = []
    for stage in stages:
        step = stage.steps[tensor]
        drv = step if isinstance(step, Derivation) else None
        key = known.key(drv) if drv else None
        declared = recipe.stages.get(stage.name)
        params = tuple(origins.get(stage.name, ()))
        if drv and isinstance(declared, ApplyLoraStage):
            params = weights(declared, drv)
        found.append(
            Explanation(
                stage=stage.name,
                tensor=tensor,
                builder=drv.builder if drv else None,
                version=drv.version if drv else None,
                numerics=drv.numerics if drv else None,
                output=str(step.spec),
                inputs=tuple(map(_input, inputs_of(step))),
                params=params if drv else (),
                key=key.hex if key else None,
            )
        )
    return tuple(found)


def weights(stage: ApplyLoraStage, drv: Derivation) -> tuple[Origin, ...]:
    """The weights of the adapters that change a tensor."""
    read = {given.source for given in drv.inputs if isinstance(given, SourceTensor)}
    uses = [use for use in stage.adapters if use.adapter.base_text in read]
    return tuple(Origin("weight", str(use.adapter), use.weight, use.at) for use in uses)


def _input(given: Input) -> str:
    where = given.source if isinstance(given, SourceTensor) else given.stage
    return f"{where}: {given.name} {given.spec}"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
