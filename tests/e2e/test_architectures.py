"""Architectures that transformers knows: random siblings are merged and stacked, and load without a weight too few or
too many. `KITTYBUILD_GOLDEN=write pytest -n 0` on this file writes the table in docs/architectures.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from kittybuild import api
from kittybuild.planner.towers import Tower, sliced
from kittybuild.store.store import Store
from tests.architectures import ARCHITECTURES, Architecture, loaded, write_siblings
from tests.helpers import load_tensors, write_recipe

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TABLE = re.compile(r"(?<=<!-- architectures -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
HEADER = "| model type | class | kind | tensors | merged | sliced |\n|---|---|---|---|---|---|\n"
LINEAR = {"merge_method": "linear", "parameters": {"weight": 0.5}, "models": [{"model": "a"}, {"model": "b"}]}


def build(folder: Path, recipe: dict[str, object], out: str) -> Path:
    """The output folder of a recipe that lies beside the models."""
    read = api.read_recipe(write_recipe(folder, recipe))
    with Store.open(str(folder / "store")) as store:
        api.build(api.prepare(read, folder=str(folder / out)), store, processes=False)
    return folder / out


def stacked(architecture: Architecture, stacks: tuple[Tower, ...]) -> dict[str, object]:
    """A recipe of slices of both siblings in turn, of each of two stacks; the rest is that of `a`."""
    sources = [
        {"sources": [{"model": "ab"[number % 2], "layer_range": list(span)}]}
        for number, span in enumerate(architecture.slices)
    ]
    if len(stacks) == 1:
        return {"merge_method": "passthrough", "slices": sources}
    modules = {tower.label: {"slices": sources} for tower in stacks}
    return {"merge_method": "passthrough", "base_model": "a", "modules": modules, "take": "base"}


def towers_of(folder: Path) -> tuple[Tower, ...]:
    """What the model in a folder is sliced from: one stack, or an encoder and a decoder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return sliced(load_tensors(folder), config)


def check_mean(folder: Path, out: Path) -> int:
    """Each tensor of the output is the mean of the siblings' (or is theirs, if it is no float); how many there are."""
    import torch

    one, other, made = (load_tensors(path) for path in (folder / "a", folder / "b", out))
    assert made.keys() == one.keys()
    for name, tensor in made.items():
        mean = (one[name].double() + other[name].double()) / 2
        torch.testing.assert_close(tensor, mean.to(tensor.dtype))
    return len(made)


def check_layers(folder: Path, out: Path, architecture: Architecture, tower: Tower) -> None:
    """Each tensor of the output's layers is that of the layer it comes from."""
    import torch

    siblings = [load_tensors(folder / name) for name in "ab"]
    made = load_tensors(out)
    plan = [(n % 2, layer) for n, span in enumerate(architecture.slices) for layer in range(*span)]
    seen = 0
    for name, tensor in made.items():
        if layer := tower.layer(name):
            model, origin = plan[layer.index]
            assert torch.equal(tensor, siblings[model][layer.at(origin)])
            seen += 1
    assert seen == sum(indices(siblings[model], tower).count(origin) for model, origin in plan)


def indices(tensors: Iterable[str], tower: Tower) -> list[int]:
    """The layer of each tensor of the tower."""
    return [layer.index for name in tensors if (layer := tower.layer(name))]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.model_type)
def test_siblings_are_merged_stacked_and_load(architecture: Architecture, tmp_path: Path) -> None:
    write_siblings(architecture, tmp_path)
    soup = build(tmp_path, LINEAR, "soup")
    count = check_mean(tmp_path, soup)
    assert loaded(architecture, soup)[1] == {}
    stacks = towers_of(tmp_path / "a")
    told = "no: one layer, used again and again"
    if architecture.slices:
        tall = build(tmp_path, stacked(architecture, stacks), "tall")
        for tower in stacks:
            check_layers(tmp_path, tall, architecture, tower)
        assert loaded(architecture, tall)[1] == {}
        layers = sum(end - start for start, end in architecture.slices)
        told = ", ".join(f"`{tower.label}` {tower.count} → {layers}" for tower in stacks)
    row = f"| `{architecture.model_type}` | {architecture.model} | {architecture.kind} | {count} | yes | {told} |"
    if os.environ.get("KITTYBUILD_GOLDEN") == "write":
        write_row(row, architecture.model_type)
    assert row in table().splitlines()


def test_the_table_has_these_architectures() -> None:
    rows = table().removeprefix(HEADER).splitlines()
    assert [key(row) for row in rows] == [one.model_type for one in ARCHITECTURES]
    assert len(rows) >= 40


def table() -> str:
    """The table in the page."""
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found
    return found[0]


def key(row: str) -> str:
    """The model type of a row."""
    return row.split("`")[1]


def write_row(row: str, model_type: str) -> None:
    """Put a row into the table, in the order of ARCHITECTURES."""
    text = PAGE.read_text(encoding="utf-8")
    rows = {key(line): line for line in table().removeprefix(HEADER).splitlines()}
    rows[model_type] = row
    order = [one.model_type for one in ARCHITECTURES if one.model_type in rows]
    made = HEADER + "".join(f"{rows[name]}\n" for name in order)
    PAGE.write_text(TABLE.sub(lambda _: made, text), encoding="utf-8")
