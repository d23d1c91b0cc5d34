"""What kittybuild makes of the cases: one recipe with a stage for each, to be built, or planned and made in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from torch import Tensor

from kittybuild.builders.registry import BUILTIN
from kittybuild.model.derivation import SourceTensor, StageTensor, Step
from kittybuild.planner.lower import lower
from kittybuild.planner.machine import this_machine
from kittybuild.planner.targets import targets
from kittybuild.planner.views import locate, open_all, source_names
from kittybuild.recipe.parse import parse_recipe
from tests.helpers import load_tensors
from tests.jobs import realised
from tests.parity.exact_cases import Case


def recipe_of(numerics: str, chosen: Sequence[Case]) -> str:
    """The text. Case number i is the stage `case-i`, and goes into the folder `ours/KEY`."""
    stages = {f"case-{number}": {"kind": "merge", **case.config} for number, case in enumerate(chosen)}
    recipe = {
        "kittybuild": 1,
        "name": "parity",
        "numerics": numerics,
        "allow_nan": True,  # some of what the peers make is NaN
        "stages": stages,
        "outputs": {name: {"folder": f"ours/{case.key}"} for name, case in zip(stages, chosen, strict=True)},
    }
    return yaml.safe_dump(recipe, sort_keys=False)


def made_in_memory(numerics: str, chosen: Sequence[Case], folder: Path) -> Iterator[tuple[Case, dict[str, Tensor]]]:
    """The tensors of each case, over the models in `folder`."""
    recipe = parse_recipe(recipe_of(numerics, chosen), f"{folder}/recipe.yml", BUILTIN.catalogue())
    sources = locate(recipe, source_names(recipe))
    machine = this_machine(os.environ.get("ATEN_CPU_CAPABILITY"))
    plan = lower(recipe, targets(recipe, ()), open_all(sources), BUILTIN, machine)
    models = {name: load_tensors(path) for name, path in sources.items()}

    def made(step: Step) -> Tensor:
        if isinstance(step, SourceTensor):
            return models[step.source][step.name]
        if isinstance(step, StageTensor):
            return made(plan.step(step))
        return realised(step, list(map(made, step.inputs))).tensor

    for number, case in enumerate(chosen):
        yield case, {name: made(step) for name, step in plan.stages[f"case-{number}"].steps.items()}
