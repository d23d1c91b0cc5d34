"""What `plan` says is what `build` then does; and `store info` counts what is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.building import Answer, build, contents, fails, fresh, manifest_of, packs
from tests.helpers import load_tensors, pico_adapter, pico_llama, run_cli, save_tensors, write_recipe

HEAVY = {"torch", "transformers", "numpy", "gguf", "tokenizers", "safetensors", "huggingface_hub"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "base", 0, layers=4, shards=2)
    pico_llama(folder / "happy", 1, base=folder / "base")
    pico_adapter(folder / "mood", folder / "base", 2)
    return folder


def recipe_with(models: Path, folder: Path, *, weight: float = 0.5, keep: bool = True) -> str:
    """LoRA on the base, a mean in which one layer has its own weight, and a frankenmerge of that in another dtype."""
    only = [{"filter": "layers.1.", "value": weight}, {"value": 0.5}]
    soup = [{"model": "glad", "parameters": {"weight": only}}, {"model": "happy", "parameters": {"weight": 0.5}}]
    slices = [
        {"sources": [{"model": "soup", "layer_range": [0, 3]}]},
        {"sources": [{"model": "base", "layer_range": [1, 4]}]},
    ]
    return write_recipe(
        folder,
        {
            "kittybuild": 1,
            "sources": {name: {"path": str(models / name)} for name in ("base", "happy", "mood")},
            "stages": {
                "glad": {"kind": "apply_lora", "base": "base", "adapters": [{"adapter": "mood"}], "keep": keep},
                "soup": {"merge_method": "linear", "models": soup},
                "tall": {"merge_method": "passthrough", "slices": slices, "dtype": "float32"},
            },
            "outputs": {
                "soup": {"folder": "out/soup", "shard_size": "30KB"},
                "tall": {"folder": "out/tall", "shard_size": "30KB"},
            },
        },
    )


def planned(recipe: str, store: Path, *stages: str) -> dict[str, Any]:
    status, document = run_cli("plan", recipe, *stages, "--store", store)
    assert (status, document["ok"]) == (0, True), document
    return document


def assert_kept(plan: Mapping[str, Any], answer: Answer) -> None:
    """The numbers of the plan are those of the build."""
    for name, stage in plan["stages"].items():
        made = answer["stages"][name]
        assert (stage["tensors"], stage["computed"]) == (made["tensors"], made["computed"]), name
        assert stage["tensors"] == stage["computed"] + stage["copied"] + stage["there"] + stage["fetched"]
        if name in answer["outputs"]:
            out = answer["outputs"][name]
            assert (stage["linked"], stage["shards"] - stage["linked"]) == (out["shards_linked"], out["shards_written"])
    assert plan["folders"] == {name: out["folder"] for name, out in answer["outputs"].items()}
    assert set(plan["stages"]) == set(answer["stages"])


def total(plan: Mapping[str, Any], number: str) -> int:
    return sum(stage[number] for stage in plan["stages"].values())


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "fused"])
class TestPlan:
    def test_of_a_first_build(self, keep: bool, models: Path, tmp_path: Path) -> None:
        recipe = recipe_with(models, tmp_path, keep=keep)
        plan = planned(recipe, tmp_path / "store")
        assert not (tmp_path / "store").exists()
        answer = build(recipe, "--store", tmp_path / "store")
        assert plan["stages"]["soup"]["computed"] == 39
        assert plan["stages"]["tall"]["linked"] == 0
        written = sum(map(len, packs(tmp_path / "store").values()))
        assert answer["bytes"]["written"] == written
        assert sum(stage["written"] for stage in plan["stages"].values()) == pytest.approx(written, rel=0.1)
        assert sum(stage["read"] for stage in plan["stages"].values()) == pytest.approx(
            answer["bytes"]["read"], rel=0.1
        )
        assert {"config.json", "generation_config.json"} <= set(plan["stages"]["soup"]["files"])
        assert 10_000_000 < plan["peak_memory"] <= 4_000_000_000

    def test_of_a_build_with_nothing_to_do(self, keep: bool, models: Path, tmp_path: Path) -> None:
        recipe = recipe_with(models, tmp_path, keep=keep)
        build(recipe, "--store", tmp_path / "store")
        plan = planned(recipe, tmp_path / "store")
        assert all(stage["computed"] == stage["read"] == stage["written"] == 0 for stage in plan["stages"].values())
        assert_kept(plan, build(recipe, "--store", tmp_path / "store"))

    def test_of_a_build_after_a_small_change(self, keep: bool, models: Path, tmp_path: Path) -> None:
        build(recipe_with(models, tmp_path, keep=keep), "--store", tmp_path / "store")
        before = packs(tmp_path / "store")
        recipe = recipe_with(models, tmp_path, keep=keep, weight=0.75)
        plan = planned(recipe, tmp_path / "store")
        answer = build(recipe, "--store", tmp_path / "store")
        assert plan["stages"]["soup"]["computed"] == 9
        assert plan["stages"]["soup"]["linked"] > 0
        assert plan["stages"]["soup"]["copied"] > 0
        new = packs(tmp_path / "store").keys() - before.keys()
        written = sum(len(packs(tmp_path / "store")[name]) for name in new)
        assert answer["bytes"]["written"] == written
        assert total(plan, "written") == written
        assert_kept(plan, answer)

    def test_of_one_stage(self, keep: bool, models: Path, tmp_path: Path) -> None:
        recipe = recipe_with(models, tmp_path, keep=keep)
        plan = planned(recipe, tmp_path / "store", "soup")
        assert set(plan["stages"]) == {"glad", "soup"}
        assert_kept(plan, build(recipe, "soup", "--store", tmp_path / "store"))


def test_of_a_build_after_one_that_was_cut_short(models: Path, tmp_path: Path) -> None:
    """It fails for a NaN in a source; what was finished by then is counted on."""
    tensors = load_tensors(models / "happy")
    shutil.copytree(models, tmp_path / "models")
    tensors["model.norm.weight"][0] = float("nan")
    save_tensors(tmp_path / "models/happy/model.safetensors", tensors)
    recipe = recipe_with(tmp_path / "models", tmp_path)
    status, code, _ = fails(recipe, "--store", tmp_path / "store", "--workers", "threads", "--jobs", "1")
    assert (status, code) == (5, "KB508")
    text = Path(recipe).read_text(encoding="utf-8")
    write_recipe(tmp_path, text.replace("kittybuild: 1", "kittybuild: 1\nallow_nan: true"))
    before = contents(tmp_path / "store/tmp")
    assert any(name.endswith(".journal") for name in before)
    plan = planned(recipe, tmp_path / "store")
    assert contents(tmp_path / "store/tmp") == before
    assert plan["stages"]["soup"]["copied"] > 0
    answer = build(recipe, "--store", tmp_path / "store")
    for name, stage in plan["stages"].items():
        assert stage["computed"] == answer["stages"][name]["computed"], name


def told(folder: Path) -> dict[str, bytes]:
    """All that is there but the database, which SQLite opens in its own way."""
    return {name: data for name, data in contents(folder).items() if "/index/" not in name}


def test_a_plan_changes_nothing_and_loads_no_torch(models: Path, tmp_path: Path) -> None:
    recipe = recipe_with(models, tmp_path)
    for _ in range(2):
        before = told(tmp_path)
        done = fresh("plan", recipe, "--store", tmp_path / "store", "--json", env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert json.loads(done.stdout)["ok"], done.stderr
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "kittybuild" in loaded
        assert not loaded & HEAVY
        assert told(tmp_path) == before
        build(recipe, "--store", tmp_path / "store")
        recipe = recipe_with(models, tmp_path, weight=0.9)


def test_a_plan_for_a_person_names_the_numbers(models: Path, tmp_path: Path) -> None:
    done = fresh("plan", recipe_with(models, tmp_path), "--store", tmp_path / "store")
    assert done.returncode == 0
    assert "soup (merge): 39 tensors\n  compute 39, copy 0, there already 0\n" in done.stdout
    assert "peak memory about " in done.stdout


def test_of_a_long_chain_of_stages(models: Path, tmp_path: Path) -> None:
    """Longer than Python's usual depth of calls allows; made in memory, so that the worker meets the whole chain."""
    length = 300
    names = [str(models / "base"), *(f"s{number}" for number in range(length))]
    one = {"merge_method": "linear", "parameters": {"weight": 1.0}, "keep": False}
    stages = {name: {**one, "models": [{"model": before}]} for before, name in pairwise(names)}
    outputs = {names[-1]: {"folder": "out"}}
    recipe = write_recipe(tmp_path, {"kittybuild": 1, "stages": stages, "outputs": outputs})
    assert len(planned(recipe, tmp_path / "store")["stages"]) == length
    answer = build(recipe, "--store", tmp_path / "store", "--workers", "processes", "--memory", "400MB")
    assert answer["stages"][names[-1]]["computed"] == answer["stages"][names[-1]]["tensors"]


def test_a_plan_that_cannot_be_made_says_why(models: Path, tmp_path: Path) -> None:
    slices = [{"sources": [{"model": str(models / "base"), "layer_range": [0, 9]}]}]
    recipe = write_recipe(tmp_path, {"merge_method": "passthrough", "slices": slices})
    status, document = run_cli("plan", recipe, "--store", tmp_path / "store")
    assert (status, document["ok"], document["errors"][0]["code"]) == (3, False, "KB303")


class TestStoreInfo:
    def test_counts_what_is_there(self, models: Path, tmp_path: Path) -> None:
        store = tmp_path / "store"
        answer = build(recipe_with(models, tmp_path), "--store", store)
        status, info = run_cli("store", "info", "--store", store)
        assert status == 0
        held = packs(store)
        assert info["store"] == str(store)
        assert (info["packs"], info["pack_bytes"]) == (len(held), sum(map(len, held.values())))
        assert info["manifests"] == 3
        for name, root in zip(("soup", "tall"), info["roots"], strict=True):
            made = {"output": name, "folder": str(tmp_path / "out" / name), "manifest": manifest_of(answer, name)}
            recipe, size = str(tmp_path / "recipe.yml"), root["bytes"]
            assert root == {**made, "recipe": recipe, "bytes": size, "alone_bytes": root["alone_bytes"], "there": True}
            assert 0 <= root["alone_bytes"] <= size <= info["pack_bytes"]
        assert (info["interrupted"], info["tmp_bytes"]) == (0, 0)
        # The same folder again: still one root for each output.
        build(recipe_with(models, tmp_path, weight=0.75), "--store", store)
        assert len(run_cli("store", "info", "--store", store)[1]["roots"]) == 2

    def test_of_a_store_that_was_moved_is_the_same(self, models: Path, tmp_path: Path) -> None:
        recipe = recipe_with(models, tmp_path)
        build(recipe, "--store", tmp_path / "store")
        before = run_cli("store", "info", "--store", tmp_path / "store")[1]
        shutil.move(tmp_path / "store", tmp_path / "moved")
        after = run_cli("store", "info", "--store", tmp_path / "moved")[1]
        assert {**after, "store": ""} == {**before, "store": ""}
        answer = build(recipe, "--store", tmp_path / "moved")
        assert answer["bytes"] == {"read": 0, "written": 0}

    def test_where_no_store_is(self, tmp_path: Path) -> None:
        status, document = run_cli("store", "info", "--store", tmp_path / "nowhere")
        assert (status, document["errors"][0]["code"]) == (7, "KB711")
        assert not os.path.exists(tmp_path / "nowhere")

    def test_loads_no_torch(self, models: Path, tmp_path: Path) -> None:
        build(recipe_with(models, tmp_path), "--store", tmp_path / "store")
        done = fresh("store", "info", "--store", tmp_path / "store", env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert "packs: " in done.stdout
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert not loaded & HEAVY


def test_the_plan_says_where_a_peers_random_numbers_are_out_of_reach(models: Path, tmp_path: Path) -> None:
    listed = [{"model": "happy", "parameters": {"weight": 0.5}}]
    merge = {"merge_method": "della", "base_model": "base", "models": listed}
    ties = {**merge, "merge_method": "ties"}
    recipe = {
        "kittybuild": 1,
        "sources": {name: {"path": str(models / name)} for name in ("base", "happy")},
        "stages": {
            "chance": {**merge, "numerics": "mergekitty-0.3"},
            "ours": merge,
            "sure": {**ties, "numerics": "mergekitty-0.3"},
        },
    }
    written = write_recipe(tmp_path, recipe)
    done = fresh("plan", written, "--store", tmp_path / "store")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "random" in line]
    assert len(told) == 1, done.stderr
    assert told[0].endswith(
        "della draws random numbers, which mergekitty-0.3 takes from one stream in the order of its work: its"
        " distribution is reproduced here, not its bits"
    )
    (note,) = [note for note in planned(written, tmp_path / "store")["notes"] if "random" in note]
    assert told[0].endswith(note)
