"""A merge of modules: each part of a model merged by itself, and put together again. No tensor is in two of them.

A module is named by a part of the tensors' names between dots (`encoder`, `model.visual`), or by mergekit's words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.errors import KittybuildError, PlanError
from kittybuild.model.derivation import Step
from kittybuild.model.recipe import Filtered, Given, MergeStage, Module, Parameters
from kittybuild.planner.fitting import Derive, Fitting
from kittybuild.planner.lower_merge import MergeLowering
from kittybuild.planner.machine import Machine
from kittybuild.planner.merge_params import Origin
from kittybuild.planner.merge_report import counted, listed
from kittybuild.planner.names import natural
from kittybuild.planner.parts import Findings, Views
from kittybuild.planner.towers import kind_of, towers

DEFAULT = "default"
_BRIDGES = frozenset({"multi_modal_projector", "connector", "projector", "merger", "deepstack_merger_list"})
_UNUSED = "takes no tensor"


def module_of(name: str, modules: Iterable[str]) -> str | None:
    """The module that a tensor belongs to: the one whose name stands first in its own, else by mergekit's words."""
    asked = tuple(modules)
    dotted = f".{name}"
    places = {module: dotted.find(f".{module}.") for module in asked}
    there = [module for module, place in places.items() if place >= 0]
    if there:
        return min(there, key=lambda module: (places[module], -len(module)))
    bridge = kind_of(name) == "bridge" or bool(_BRIDGES & set(name.split(".")))
    word = {"text": "text_decoder", "vision": "vision_tower"}.get(kind_of(name))
    if "vision_model" in asked and word == "vision_tower":
        word = "vision_model"
    if bridge:
        word = "multi_modal_projector"
    return word if word in asked else DEFAULT if DEFAULT in asked else None


class ModulesLowering:
    """A merge stage with modules on its way to steps; see MergeLowering."""

    def __init__(
        self,
        stage: MergeStage,
        views: Views,
        builders: Builders,
        problems: list[KittybuildError],
        seed: int,
        machine: Machine | None = None,
        derive: Derive | None = None,
    ) -> None:
        self.stage, self.problems = stage, problems
        self.names = tuple(module.name for module in stage.modules)
        self.fitting = Fitting(stage, views, builders, Findings(problems), derive)
        self.donor = views(stage.base) if stage.base else views(stage.uses()[0].model)
        self.parts = [
            MergeLowering(
                _alone(stage, module), views, builders, problems, seed, machine, derive, only=self._only(module.name)
            )
            for module in stage.modules
        ]
        self.notes: list[str] = []
        self.ignored: dict[str, dict[str, list[str]]] = {}

    def steps(self) -> dict[str, Step]:
        """The steps of all modules, and of what the base has beside them, in natural order of their names."""
        found: dict[str, Step] = {}
        base = self.fitting.reference
        outside = [name for name in base.tensors if module_of(name, self.names) is None]
        for module in self.stage.modules:
            if not any(module_of(name, self.names) == module.name for name in base.tensors):
                stacks = ", ".join(tower.label for tower in towers(base.tensors, base.config))
                message = f"no tensor of {base.label} belongs to the module {module.name!r}"
                self._fail("KB314", message, module, f"its stacks of layers: {stacks}" if stacks else None)
        if outside and not self.stage.take:
            text = f"{counted(len(outside), 'tensor')} of {base.label} belong to no module:"
            hint = "name their modules too, or add `default:` for the rest, or `take: base`"
            self._fail("KB315", text + listed(sorted(outside, key=natural)), self.stage, hint)
        if self.problems:
            return {}
        for part in self.parts:
            found |= part.steps()
        found |= {name: self.parts[0].taken(base.tensors[name]) for name in outside}
        self._tell()
        return {name: found[name] for name in sorted(found, key=natural)}

    def config(self) -> Mapping[str, Any] | None:
        """The donor's config.json as the modules change it, one after the other."""
        config = self.donor.config
        for part in self.parts:
            config = part.config(config)
        return config

    def origins(self, tensor: str) -> tuple[Origin, ...]:
        """See MergeLowering."""
        return next((found for part in self.parts if (found := part.origins(tensor))), ())

    def _only(self, module: str) -> Callable[[str], bool]:
        return lambda name: module_of(name, self.names) == module

    def _fail(self, code: str, message: str, where: Module | MergeStage, hint: str | None) -> None:
        self.problems.append(PlanError(code, message, at=str(where.at), hint=hint))

    def _tell(self) -> None:
        """The notes of all modules, each once. What takes no tensor of one module may take one of another."""
        told = Counter(note for part in self.parts for note in part.notes)
        everywhere = len(self.parts)
        self.notes += [note for note, times in told.items() if not note.endswith(_UNUSED) or times == everywhere]
        for rule, models in (found for part in self.parts for found in part.ignored.items()):
            for model, names in models.items():
                self.ignored.setdefault(rule, {}).setdefault(model, []).extend(names)


def _alone(stage: MergeStage, module: Module) -> MergeStage:
    """A module as a merge: its parameters count before those of the whole."""
    parameters = _before(module.parameters, stage.parameters)
    return replace(stage, models=module.models, slices=module.slices, parameters=parameters, modules=(), at=module.at)


def _before(first: Parameters, second: Parameters) -> dict[str, Given]:
    """Two levels of parameters as one: where no entry of the first matches, the second is asked."""
    found: dict[str, Given] = {**second, **first}
    for name in first.keys() & second.keys():
        values: tuple[Filtered, ...] = (*first[name].values, *second[name].values)
        found[name] = Given(values, first[name].at)
    return found
