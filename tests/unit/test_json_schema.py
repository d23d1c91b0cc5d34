"""The schema for editors: every recipe that we know is valid, mistakes are found, and every key says what it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from kittybuild.builders.registry import BUILTIN
from kittybuild.recipe.json_schema import json_schema
from kittybuild.recipe.meanings import MEANINGS
from tests.helpers import run_cli
from tests.unit.test_docs import FRAGMENT, blocks

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json_schema(BUILTIN.catalogue())
VALIDATOR = Draft202012Validator(SCHEMA)
RECIPES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("recipes/**/*.yml")
}
RECIPES |= {place: text for place, text in blocks("yaml") if not text.startswith(FRAGMENT)}
SOUP: dict[str, Any] = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a"}]}


def problems(recipe: Any) -> list[str]:
    """Where a recipe is not as the schema wants it, and what is said of it."""
    errors = VALIDATOR.iter_errors(recipe)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("place", RECIPES)
def test_every_recipe_that_we_know_is_valid(place: str) -> None:
    for document in yaml.safe_load_all(RECIPES[place]):
        assert problems(json.loads(json.dumps(document))) == []


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"weight": "1e-4"}},
        {"parameters": {"weight": [0, 1], "normalize": False}},
        {
            "parameters": {
                "weight": [{"filter": "attn", "value": [0.1, 0.2]}, {"layers": "1..", "value": 1}, {"value": 0}]
            }
        },
        {"numerics": "mergekit-0.1.5", "dtype": "torch.bfloat16", "tokenizer_source": "union", "parameters": None},
        {"tokenizer": {"source": "union", "tokens": {"<s>": {"source": {"kind": "zero"}, "force": True}}}},
        {"base_model": {"model": {"path": "x", "revision": "y"}}},
    ],
    ids=str,
)
def test_what_may_be_written_is_valid(change: dict[str, Any]) -> None:
    assert problems({**SOUP, **change}) == []
    assert problems({"kittybuild": 1, "stages": {"soup": {**SOUP, **change}}}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merge_metod": "ties"}, "merge_metod"),
        ({"merge_method": "tise"}, "tise"),
        ({"parameters": {"wieght": 1}}, "wieght"),
        ({"parameters": {"normalize": {"x": 1}}}, "parameters"),
        ({"models": [{"weight": 1}]}, "weight"),
        ({"dtype": "bf16"}, "bf16"),
        ({"numerics": "mergekit-9"}, "mergekit-9"),
        ({"models": [{"model": "a", "parameters": {"weight": {"filter": "x"}}}]}, "models"),
    ],
    ids=str,
)
def test_mistakes_are_found_wherever_the_stage_stands(change: dict[str, Any], said: str) -> None:
    for recipe in ({**SOUP, **change}, {"kittybuild": 1, "stages": {"soup": {**SOUP, **change}}}):
        found = problems(recipe)
        assert found
        assert any(said in each for each in found), found


@pytest.mark.parametrize(
    ("stage", "valid"),
    [
        ({"kind": "apply_lora", "base": "b", "adapters": [{"adapter": "a"}]}, True),
        ({"kind": "apply_lora", "base": "b"}, False),
        ({"kind": "extract_lora", "model": "m", "base": "b", "rank": 16}, True),
        ({"kind": "extract_lora", "model": "m", "base": "b", "rank": {"most": 64, "energy": 0.9}}, True),
        ({"kind": "extract_lora", "model": "m", "base": "b", "rank": 0}, False),
        ({"kind": "merge_adapters", "method": "cat", "adapters": [{"adapter": "a"}]}, True),
        ({"kind": "moe", "base_model": "b", "experts": [{"source_model": "a"}], "gate_mode": "random"}, True),
        ({"kind": "moe", "base_model": "b", "experts": [], "gate_mode": "rnd"}, False),
        ({"kind": "transplant_tokenizer", "model": "m", "donor": "d", "k": 8}, True),
        ({"kind": "state_dict", **SOUP, "tensors": "union"}, True),
        ({"kind": "soup", **SOUP}, False),
    ],
    ids=str,
)
def test_every_kind_of_stage_has_its_form(stage: dict[str, Any], valid: bool) -> None:
    assert bool(problems({"kittybuild": 1, "stages": {"one": stage}})) is not valid


def test_every_key_says_what_it_means_and_no_meaning_is_left_over() -> None:
    forms = {name: form for name, form in SCHEMA["$defs"].items() if "properties" in form and name != "Parameters"}
    for name, form in forms.items():
        for key, value in form["properties"].items():
            assert value["description"], f"{name}.{key}"
    keys = {key for name, form in forms.items() for key in form["properties"]}
    named = {f"{name}.{key}" for name, form in forms.items() for key in form["properties"]}
    assert {word for word in MEANINGS if word not in named | keys} == set()


def test_the_parameters_are_those_of_all_methods() -> None:
    wanted = {p.name for numerics in BUILTIN.classes() for m in BUILTIN.methods(numerics) for p in m.params}
    assert set(SCHEMA["$defs"]["Parameters"]["properties"]) == wanted
    assert "density" in wanted


def test_the_command_prints_it_and_knows_plug_ins(tmp_path: Path) -> None:
    status, document = run_cli("schema")
    assert (status, document) == (0, {"ok": True, "schema": SCHEMA})
    source, _ = (text for _, text in blocks("python", ROOT / "docs/plugins.md"))
    (tmp_path / "loudest.py").write_text(source, encoding="utf-8")
    _, document = run_cli("schema", "--methods", tmp_path / "loudest.py")
    words = [method["const"] for method in document["schema"]["$defs"]["Method"]["anyOf"]]
    assert "loudest" in words
    assert "strength" in document["schema"]["$defs"]["Parameters"]["properties"]
