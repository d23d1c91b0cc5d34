"""Recipes parsed and lowered in tests, without a store and without torch; and checkpoints that are headers only.

`plan = planned(tmp_path, {"a": llama(), "b": llama()}, "merge_method: linear ...")`
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.digest import Digest
from kittybuild.errors import KittybuildError, Problems
from kittybuild.model.derivation import Derivation
from kittybuild.model.plan import Plan
from kittybuild.model.recipe import MergeStage, Recipe
from kittybuild.planner.lower import lower
from kittybuild.planner.machine import Machine
from kittybuild.planner.targets import targets
from kittybuild.planner.views import locate, open_all, source_names
from kittybuild.recipe.parse import parse_recipe
from kittybuild.tensors import DType
from tests.helpers import llama_config, llama_shapes, write_json

Header = Mapping[str, tuple[str, Sequence[int]]]


def parse(text: str, builders: Builders = BUILTIN) -> Recipe:
    """The recipe of a text, its common indentation taken away."""
    return parse_recipe(textwrap.dedent(text), "recipe.yml", builders.catalogue())


def merge_of(text: str) -> MergeStage:
    """The one stage of a mergekit configuration."""
    (stage,) = parse(text).stages.values()
    assert isinstance(stage, MergeStage)
    return stage


def errors_of(function: Callable[..., object], *args: Any) -> tuple[KittybuildError, ...]:
    """The errors that a call raises; none if it does not."""
    try:
        function(*args)
    except Problems as problems:
        return problems.errors
    except KittybuildError as error:
        return (error,)
    return ()


def found(function: Callable[..., object], *args: Any) -> list[tuple[str, str]]:
    """Code and place of each error of a call."""
    return [(error.code, str(error.at)) for error in errors_of(function, *args)]


def llama(dtype: str = "BF16", *, layers: int = 2, vocab: int = 64, tie: bool = False) -> Header:
    """The header of a pico Llama: dtype and shape by name."""
    shapes = llama_shapes(layers=layers, vocab=vocab, tie=tie)
    return {name: (dtype, shape) for name, shape in shapes.items()}


def header_bytes(header: Header, *, data: bool = True) -> bytes:
    """A whole safetensors file of zeros."""
    entries: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in header.items():
        size = DType(dtype).size
        for side in shape:
            size *= side
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + (bytes(end) if data else b"")


def write_header(folder: str | Path, header: Header, config: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint folder of zeros, with the config.json of a Llama if none is given."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(header_bytes(header))
    layers = 1 + max((int(name.split(".")[2]) for name in header if name.startswith("model.layers.")), default=0)
    tie = "lm_head.weight" not in header
    plain = llama_config(layers=layers, width=32, vocab=64, tie=tie, dtype="bfloat16")
    write_json(folder / "config.json", plain if config is None else config)
    return folder


def planned(
    folder: Path,
    models: Mapping[str, Header],
    text: str,
    asked: Sequence[str] = (),
    builders: Builders = BUILTIN,
    machine: Machine | None = None,
) -> Plan:
    """The plan of a recipe that lies in `folder`, beside checkpoints of these headers."""
    for name, header in models.items():
        write_header(folder / name, header)
    recipe = parse_recipe(textwrap.dedent(text), os.path.join(folder, "recipe.yml"), builders.catalogue())
    sources = open_all(locate(recipe, source_names(recipe)))
    return lower(recipe, targets(recipe, asked), sources, builders, machine)


def prints_of(recipe: Recipe, changed: str | None = None) -> dict[str, Digest]:
    """Identities for the sources of a recipe: each is what its path says, but `changed` is something else."""
    decls = source_names(recipe)
    return {name: Digest.of(f"{decl.path} {name == changed}".encode()) for name, decl in decls.items()}


def step(plan: Plan, name: str, stage: str = "merge") -> Derivation:
    """The derivation of a tensor."""
    made = plan.stages[stage].steps[name]
    assert isinstance(made, Derivation), made
    return made
