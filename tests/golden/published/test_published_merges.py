"""`reproduce` on folders that mergekit 0.1.5 itself wrote: bit for bit, and an edited weight is found and named."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.golden.published.cases import HERE, RECIPES, write_models
from tests.helpers import load_tensors, noise, run_cli, save_tensors

TORCH = "2.13.0"
EDITED = "model.layers.1.mlp.up_proj.weight"

pytestmark = pytest.mark.skipif(
    version("torch").partition("+")[0] != TORCH or platform.machine() not in ("x86_64", "AMD64"),
    reason=f"recorded with torch {TORCH} on x86-64",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what mergekit wrote."""
    shutil.copytree(HERE / request.param, tmp_path / request.param)
    return tmp_path / str(request.param)


def reproduced(folder: Path, models: dict[str, Path], *args: str) -> tuple[int, dict[str, Any]]:
    used = [name for name in models if name in (folder / "README.md").read_text(encoding="utf-8")]
    sources = [word for name in used for word in ("--source", f"{name}={models[name]}")]
    return run_cli("reproduce", folder, *sources, "--store", folder.parent / "store", "--workers", "threads", *args)


every = pytest.mark.parametrize("folder", list(RECIPES), indirect=True)
ties = pytest.mark.parametrize("folder", ["ties"], indirect=True)


def edit(folder: Path, how: Any) -> None:
    """Change the tensor EDITED in its file."""
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if EDITED in tensors:
            how(tensors)
            save_tensors(file, tensors)
            return
    raise AssertionError(folder)


def nudge(tensors: dict[str, Any], steps: int = 1) -> None:
    """Move one element by so many units in the last place."""
    import torch

    tensors[EDITED].view(torch.int16).flatten()[3] += steps


@every
def test_what_mergekit_wrote_is_reproduced_bit_for_bit(folder: Path, models: dict[str, Path]) -> None:
    status, document = reproduced(folder, models)
    assert (status, document["ok"]) == (0, True), document
    assert document["tensors"] == {
        "identical": len(load_tensors(folder)),
        **dict.fromkeys(("close", "different", "only_published", "only_rebuilt", "other_dtype", "other_shape"), 0),
    }
    assert (document["numerics"], document["recipe"]) == (["mergekit-0.1.5"], "mergekit_config.yml")
    assert (document["computed"], document["cause"]) == (len(load_tensors(folder)), None)


@every
def test_one_edited_weight_is_found_and_named(folder: Path, models: dict[str, Path]) -> None:
    edit(folder, nudge)
    status, document = reproduced(folder, models)
    assert (status, document["ok"], document["errors"][0]["code"]) == (6, False, "KB606")
    (different,) = document["differences"]
    size = load_tensors(folder)[EDITED].numel()
    assert different.items() >= {"tensor": EDITED, "how": "close", "ulps": 1, "elements": 1, "of": size}.items()
    assert 0 < different["max_abs"] < 0.01
    assert 0 < different["relative"] < different["max_abs"]
    assert f"{EDITED}: 1 of {size} elements differ, by 1 ulp at most" in document["errors"][0]["message"]


@ties
def test_within_so_many_units_is_accepted(folder: Path, models: dict[str, Path]) -> None:
    edit(folder, lambda tensors: nudge(tensors, 3))
    assert reproduced(folder, models)[0] == 6
    assert reproduced(folder, models, "--within", "2")[0] == 6
    status, document = reproduced(folder, models, "--within", "3")
    assert (status, document["ulps"], document["tensors"]["close"]) == (0, 3, 1)


@ties
def test_nan_is_within_no_distance(folder: Path, models: dict[str, Path]) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[EDITED][0, 0] = float("nan")

    edit(folder, spoil)
    status, document = reproduced(folder, models, "--within", "100000")
    assert (status, document["differences"][0]["how"]) == (6, "different")


@ties
def test_missing_renamed_and_retyped_tensors_are_named(folder: Path, models: dict[str, Path]) -> None:
    import json

    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text(encoding="utf-8"))
    place = found["weight_map"].pop(EDITED)
    index.write_text(json.dumps({**found, "weight_map": {**found["weight_map"], "other": place}}), encoding="utf-8")

    def change(tensors: dict[str, Any]) -> None:
        tensors["other"] = tensors.pop(EDITED)

    edit(folder, change)
    status, document = reproduced(folder, models)
    assert status == 6
    assert [(one["tensor"], one["how"]) for one in document["differences"]] == [
        (EDITED, "only rebuilt"),
        ("other", "only published"),
    ]
    assert document["cause"].startswith(f"{EDITED}: only rebuilt")


@ties
def test_another_dtype_is_told(folder: Path, models: dict[str, Path]) -> None:
    edit(folder, lambda tensors: tensors.update({EDITED: tensors[EDITED].float()}))
    status, document = reproduced(folder, models)
    assert (status, document["differences"][0]["how"]) == (6, "other dtype")
    assert f"{EDITED}: other dtype: F32, rebuilt BF16" in document["errors"][0]["message"]


@ties
def test_other_sources_are_a_cause(folder: Path, models: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "zen"
    shutil.copytree(models["sources/pico/zen"], moved)
    tensors = load_tensors(moved)
    tensors = {name: tensor + noise(1, name, tuple(tensor.shape)).to(tensor.dtype) for name, tensor in tensors.items()}
    save_tensors(moved / "model.safetensors", tensors)
    status, document = reproduced(folder, {**models, "sources/pico/zen": moved})
    assert status == 6
    assert document["cause"].endswith("the sources or the recipe are others")


@every
def test_the_readme_alone_is_enough(folder: Path, models: dict[str, Path]) -> None:
    (folder / "mergekit_config.yml").unlink()
    status, document = reproduced(folder, models)
    assert (status, document["recipe"]) == (0, "README.md")


def test_our_own_arithmetic_is_another(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(HERE / "linear", tmp_path / "linear")
    status, document = reproduced(tmp_path / "linear", models, "--numerics", "kitty-1")
    assert (status, document["numerics"]) == (6, ["kitty-1"])
    assert document["tensors"]["close"] > 0
    assert reproduced(tmp_path / "linear", models, "--numerics", "kitty-1", "--within", str(document["ulps"]))[0] == 0


@ties
def test_the_index_says_the_version(folder: Path, models: dict[str, Path]) -> None:
    assert "was written by mergekit 0.1.5" in reproduced(folder, models)[1]["notes"][0]


def test_without_an_index_it_is_taken_for_the_last_version(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(HERE / "slerp", tmp_path / "slerp")
    (note,) = reproduced(tmp_path / "slerp", models)[1]["notes"]
    assert "nothing says which version of mergekit made it; mergekit-0.1.5 is taken" in note


@ties
def test_a_source_that_is_nowhere_has_a_way_out(folder: Path, models: dict[str, Path]) -> None:
    status, document = run_cli("reproduce", folder, "--store", folder.parent / "store", "--offline")
    assert status == 4
    assert "--source NAME=PATH" in document["errors"][0]["hint"]


@ties
def test_words_that_do_not_fit(folder: Path, models: dict[str, Path]) -> None:
    def code(*args: str) -> str:
        status, document = reproduced(folder, models, *args)
        assert status == 2
        return str(document["errors"][0]["code"])

    assert code("--source", "sources/pico/base") == "KB013"
    assert code("--source", "sources/pico/bass=x") == "KB010"
    assert code("--numerics", "mergekit-0.1.6") == "KB006"


def test_a_folder_without_a_recipe(models: dict[str, Path], tmp_path: Path) -> None:
    status, document = run_cli("reproduce", models["sources/pico/base"], "--store", tmp_path / "store")
    assert (status, document["errors"][0]["code"]) == (6, "KB605")


@ties
def test_nothing_is_written_but_the_store(folder: Path, models: dict[str, Path]) -> None:
    before = sorted(path.name for path in folder.rglob("*"))
    reproduced(folder, models, "--fresh")
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["store", "ties"]
