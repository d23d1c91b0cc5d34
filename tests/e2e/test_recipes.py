"""The example recipes plan and build, each in a folder of its own with pico models where it wants models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kittybuild.api import read_recipe
from tests.building import build
from tests.helpers import load_tensors, pico_llama, run_cli

RECIPES = tuple(sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yml")))
LAYERS = 32
Built = tuple[Path, dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `models` of the recipes: a base and three siblings."""
    folder = tmp_path_factory.mktemp("examples") / "models"
    pico_llama(folder / "base", 0, layers=LAYERS, width=16, tokenizer=True)
    for seed, name in enumerate("abc", start=1):
        pico_llama(folder / name, seed, base=folder / "base")
    return folder


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.stem)
def built(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The output of a recipe, what was planned and what was done."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    (folder / "models").symlink_to(models)
    recipe = shutil.copy(request.param, folder)
    where = [] if read_recipe(recipe).outputs else ["-o", str(folder / "out")]
    status, planned = run_cli("plan", recipe, "--store", folder / "store")
    assert status == 0
    done = build(recipe, *where, "--store", folder / "store")
    (output,) = done["outputs"].values()
    return Path(output["folder"]), planned, done


def test_there_are_recipes_for_everyone() -> None:
    assert len(RECIPES) >= 3


def test_a_recipe_does_what_its_plan_says_without_a_note(built: Built) -> None:
    folder, planned, done = built
    assert planned["notes"] == done["notes"] == []
    for name, stage in done["stages"].items():
        assert planned["stages"][name]["computed"] == stage["computed"] > 0
        assert stage["nonfinite"] == {}
    assert sum(stage["written"] for stage in planned["stages"].values()) <= done["bytes"]["written"]
    assert (folder / "kittybuild.json").is_file()


def test_what_is_built_is_a_whole_model(built: Built) -> None:
    folder, _, _ = built
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_tensors(folder)
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    assert layers == set(range(config["num_hidden_layers"]))
    assert len(tensors) == 3 + 9 * len(layers)
    assert (
        {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{config['torch_dtype']}"} == {"torch.bfloat16"}
    )


def test_the_frankenmerge_holds_layers_of_both(models: Path, tmp_path: Path) -> None:
    recipe = next(path for path in RECIPES if path.stem == "frankenmerge")
    (tmp_path / "models").symlink_to(models)
    done = build(shutil.copy(recipe, tmp_path), "-o", tmp_path / "out", "--store", tmp_path / "store")
    made, first, second = (load_tensors(folder) for folder in (tmp_path / "out", models / "a", models / "b"))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert done["stages"]["merge"]["tensors"] == 3 + 9 * 48
    assert made[name.format(23)].equal(first[name.format(23)])
    assert made[name.format(24)].equal(second[name.format(8)])
    assert made["model.embed_tokens.weight"].equal(first["model.embed_tokens.weight"])
    assert made["lm_head.weight"].equal(second["lm_head.weight"])
