"""`kittybuild plan --explain`: how a tensor is made, and the line that each of its parameters came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kittybuild.builders.registry import BUILTIN
from tests.building import build, fresh
from tests.helpers import pico_adapter, pico_llama, run_cli, write_recipe

UP = "model.layers.2.mlp.up_proj.weight"
TEXT = """\
kittybuild: 1
defaults: {dtype: float32}
stages:
  glad: {kind: apply_lora, base: base, adapters: [{adapter: mood, weight: 0.25}]}
  soup:
    merge_method: ties
    base_model: base
    models:
      - {model: glad, parameters: {weight: [{filter: attn, value: 0.1}, {layers: 1..3, value: [0.5, 1.0]}]}}
      - {model: happy, parameters: {density: 0.75}}
    parameters:
      weight: 0.25
  tall:
    merge_method: passthrough
    slices:
      - sources: [{model: soup, layer_range: [0, 2]}]
      - sources: [{model: base, layer_range: [1, 4]}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside its models."""
    folder = tmp_path_factory.mktemp("explain")
    pico_llama(folder / "base", 0, layers=4, dtype="float32")
    pico_llama(folder / "happy", 1, base=folder / "base")
    pico_adapter(folder / "mood", folder / "base", 2)
    write_recipe(folder, TEXT)
    return folder


def explained(folder: Path, tensor: str, *stages: str, store: str = "nowhere") -> dict[str, dict[str, Any]]:
    status, document = run_cli("plan", folder / "recipe.yml", *stages, "--explain", tensor, "--store", folder / store)
    assert (status, document["ok"]) == (0, True), document
    return {one["stage"]: one for one in document["explain"]}


def test_each_parameter_says_where_it_stands(folder: Path) -> None:
    found = explained(folder, UP, "soup")
    assert set(found) == {"soup"}, "the adapter leaves it as it is"
    soup = found["soup"]
    at = f"{folder}/recipe.yml"
    given = {(param["name"], param["model"]): (param["value"], param["at"]) for param in soup["params"]}
    assert given["weight", "glad"] == (pytest.approx(5 / 6), f"{at}:9:73")
    assert given["weight", "happy"] == (0.25, f"{at}:12:7")
    assert given["density", "glad"] == (1.0, None)
    assert given["density", "happy"] == (0.75, f"{at}:10:37")
    assert given["normalize", None] == (True, None)
    assert (soup["builder"], soup["numerics"], soup["output"]) == ("ties", "kitty-1", "F32[64, 32]")
    assert soup["version"] == BUILTIN["ties"].version
    assert soup["inputs"] == [f"{source}: {UP} F32[64, 32]" for source in ("base", "base", "happy")]


def test_an_adapters_weight_too(folder: Path) -> None:
    glad = explained(folder, "model.layers.0.self_attn.q_proj.weight", "glad")["glad"]
    (weight,) = glad["params"]
    assert (weight["model"], weight["value"], weight["at"]) == ("mood", 0.25, f"{folder}/recipe.yml:4:51")
    assert glad["builder"] == "lora"
    assert glad["inputs"][1].startswith("mood: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight ")


def test_a_stage_that_does_not_need_it_says_nothing(folder: Path) -> None:
    first = "model.layers.0.mlp.up_proj.weight"
    assert set(explained(folder, first, "tall")) == {"soup", "tall"}
    assert set(explained(folder, UP, "tall")) == {"tall"}


def test_what_is_taken_over_has_no_builder(folder: Path) -> None:
    tall = explained(folder, UP, "tall")["tall"]
    assert (tall["builder"], tall["params"], tall["key"]) == (None, [], None)
    assert tall["inputs"] == ["base: model.layers.1.mlp.up_proj.weight F32[64, 32]"]


def test_the_key_is_told_once_the_contents_are_known(folder: Path) -> None:
    assert explained(folder, UP, "soup")["soup"]["key"] is None
    build(str(folder / "recipe.yml"), "soup", "--store", folder / "store")
    key = explained(folder, UP, "soup", store="store")["soup"]["key"]
    assert isinstance(key, str)
    assert len(key) == 64


def test_for_a_person(folder: Path) -> None:
    done = fresh("plan", folder / "recipe.yml", "soup", "--explain", UP, "--store", folder / "nowhere")
    lines = done.stdout.splitlines()
    assert f"soup: {UP}" in lines
    assert f"  made by: ties, version {BUILTIN['ties'].version}" in lines
    assert f"  weight of happy: 0.25    {folder}/recipe.yml:12:7" in lines
    assert "  density of glad: 1.0    the default" in lines
    assert "  normalize: true    the default" in lines
    assert "  key: not known yet: the content of an input is not" in lines


def test_an_unknown_tensor_is_answered_with_the_nearest(folder: Path) -> None:
    status, document = run_cli(
        "plan", folder / "recipe.yml", "--explain", UP.replace("mlp", "mpl"), "--store", folder / "nowhere"
    )
    (error,) = document["errors"]
    assert (status, error["code"], error["hint"]) == (2, "KB005", f"did you mean {UP!r}?")
