"""Only what changed is made again, and the result is the one that a cold build in another store gives."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kittybuild.store.pack import read_pack_header
from tests.building import Answer, build, contents, linear, manifest_of, packs
from tests.helpers import load_tensors, pico_adapter, pico_llama, save_tensors, write_recipe

LAYER_5 = "model.layers.5."


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three siblings of eight layers, and an adapter."""
    folder = tmp_path_factory.mktemp("siblings")
    pico_llama(folder / "base", 0, layers=8)
    for seed, name in enumerate(("happy", "calm"), start=1):
        pico_llama(folder / name, seed, base=folder / "base")
    pico_adapter(folder / "mood", folder / "base", 3)
    return folder


@pytest.fixture
def models(siblings: Path, tmp_path: Path) -> Path:
    """The same, to be changed by a test."""
    shutil.copytree(siblings, tmp_path / "models")
    return tmp_path / "models"


def assert_as_cold(tmp_path: Path, answer: Answer, recipe: str, stage: str = "merge", *args: str) -> None:
    """The folder `out` and the manifests of all stages are those of a cold build in a new store."""
    cold = build(recipe, *args, "-o", tmp_path / "cold/out", "--store", tmp_path / "cold/store")
    assert cold["stages"][stage]["computed"] > 0
    for name in answer["stages"]:
        assert manifest_of(answer, name) == manifest_of(cold, name), name
    assert contents(tmp_path / "out") == contents(tmp_path / "cold/out")


def change(model: Path, part: str) -> set[str]:
    """Add one to the tensors of a model whose names hold `part`; their names."""
    tensors = load_tensors(model)
    changed = {name for name in tensors if part in name}
    assert changed
    save_tensors(model / "model.safetensors", {n: t + 1 if n in changed else t for n, t in tensors.items()})
    return changed


def chain(models: Path, *, keep: bool = True, weight: float = 0.5, adapter_weight: float = 1.0) -> dict[str, Any]:
    """LoRA on the base, half of it with a sibling, and TIES over that and base+adapter."""
    adapters = [{"adapter": "mood", "weight": adapter_weight}]
    soup = [{"model": name, "parameters": {"weight": weight}} for name in ("glad", "happy")]
    ties = [{"model": name, "parameters": {"weight": 0.6, "density": 0.5}} for name in ("soup", "base+mood", "calm")]
    return {
        "kittybuild": 1,
        "sources": {name: {"path": str(models / name)} for name in ("base", "happy", "calm", "mood")},
        "stages": {
            "glad": {"kind": "apply_lora", "base": "base", "adapters": adapters, "keep": keep},
            "soup": {"merge_method": "linear", "models": soup, "keep": keep},
            "out": {"merge_method": "ties", "base_model": "base", "models": ties},
        },
        "outputs": {"out": {"folder": "out"}},
    }


class TestOneMerge:
    def filtered(self, tmp_path: Path, models: Path, weight: float) -> str:
        only = [{"filter": LAYER_5, "value": weight}, {"value": 0.5}]
        return linear(tmp_path, {models / "base": 0.5, models / "happy": only, models / "calm": 0.25})

    def test_a_weight_for_layer_5_computes_the_nine_tensors_of_layer_5(self, siblings: Path, tmp_path: Path) -> None:
        args = ("-o", tmp_path / "out", "--store", tmp_path / "store")
        before = build(self.filtered(tmp_path, siblings, 0.5), *args)["stages"]["merge"]
        assert (before["tensors"], before["computed"]) == (75, 75)
        old = load_tensors(tmp_path / "out")
        recipe = self.filtered(tmp_path, siblings, 0.75)
        answer = build(recipe, *args)
        stage = answer["stages"]["merge"]
        assert (stage["tensors"], stage["computed"], stage["cached"]) == (75, 9, 66)
        assert_as_cold(tmp_path, answer, recipe)
        new = load_tensors(tmp_path / "out")
        assert {name for name in new if not new[name].equal(old[name])} == {name for name in new if LAYER_5 in name}

    def test_going_back_computes_nothing_and_links_the_old_shard(self, siblings: Path, tmp_path: Path) -> None:
        args = ("-o", tmp_path / "out", "--store", tmp_path / "store")
        first = build(self.filtered(tmp_path, siblings, 0.5), *args)
        build(self.filtered(tmp_path, siblings, 0.75), *args)
        recipe = self.filtered(tmp_path, siblings, 0.5)
        answer = build(recipe, *args)
        assert answer["stages"]["merge"]["computed"] == 0
        assert answer["outputs"]["merge"]["shards_linked"] == 1
        assert manifest_of(answer) == manifest_of(first)
        assert_as_cold(tmp_path, answer, recipe)

    def test_only_the_shard_that_holds_layer_5_is_written(self, siblings: Path, tmp_path: Path) -> None:
        def sharded(weight: float) -> str:
            only = [{"filter": LAYER_5, "value": weight}, {"value": 0.5}]
            models = [
                {"model": "base", "parameters": {"weight": 0.5}},
                {"model": "happy", "parameters": {"weight": only}},
            ]
            return write_recipe(
                tmp_path,
                {
                    "kittybuild": 1,
                    "sources": {name: {"path": str(siblings / name)} for name in ("base", "happy")},
                    "stages": {"merge": {"merge_method": "linear", "models": models}},
                    "outputs": {"merge": {"folder": "out", "shard_size": "20KB"}},
                },
            )

        first = build(sharded(0.5), "--store", tmp_path / "store")["outputs"]["merge"]
        assert first["shards_written"] > 5
        recipe = sharded(0.75)
        answer = build(recipe, "--store", tmp_path / "store")
        changed = answer["outputs"]["merge"]
        assert 1 <= changed["shards_written"] <= 3
        assert changed["shards_linked"] == first["shards_written"] - changed["shards_written"]
        assert answer["stages"]["merge"]["computed"] == 9
        assert_as_cold(tmp_path, answer, recipe)

    def test_touched_sources_with_the_same_bytes_compute_nothing(self, models: Path, tmp_path: Path) -> None:
        recipe = linear(tmp_path, {models / "base": 0.5, models / "happy": 0.5})
        args = (recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        first = build(*args)
        for path in models.rglob("*"):
            os.utime(path)
        answer = build(*args)
        assert answer["stages"]["merge"]["computed"] == 0
        assert manifest_of(answer) == manifest_of(first)
        assert build(*args)["bytes"]["read"] == 0

    def test_a_model_that_was_moved_computes_nothing(self, models: Path, tmp_path: Path) -> None:
        args = ("-o", tmp_path / "out", "--store", tmp_path / "store")
        first = build(linear(tmp_path, {models / "base": 0.5, models / "happy": 0.5}), *args)
        shutil.move(models / "happy", models / "moved")
        answer = build(linear(tmp_path, {models / "base": 0.5, models / "moved": 0.5}), *args)
        assert answer["stages"]["merge"]["computed"] == 0
        assert manifest_of(answer) == manifest_of(first)

    def test_a_changed_source_tensor_computes_what_depends_on_it(self, models: Path, tmp_path: Path) -> None:
        recipe = linear(tmp_path, {models / "base": 0.5, models / "happy": 0.5})
        args = (recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        build(*args)
        assert len(change(models / "happy", "layers.3.mlp")) == 3
        answer = build(*args)
        assert answer["stages"]["merge"]["computed"] == 3
        assert_as_cold(tmp_path, answer, recipe)

    def test_a_change_of_which_no_bit_arrives_rewrites_nothing(self, siblings: Path, tmp_path: Path) -> None:
        """A weight of twice the size in a normalized mean of one model."""
        args = ("-o", tmp_path / "out", "--store", tmp_path / "store")
        first = build(linear(tmp_path, {siblings / "base": 1.0}), *args)
        answer = build(linear(tmp_path, {siblings / "base": 2.0}), *args)
        assert answer["stages"]["merge"]["computed"] == 75
        tensors = [json.loads((tmp_path / "out/kittybuild.json").read_text())["manifest"]["tensors"]]
        assert len(packs(tmp_path / "store")) == 1
        assert manifest_of(answer) != manifest_of(first)  # it holds the derivation keys, which did change
        assert len(tensors[0]) == 75


class TestChain:
    def built(self, tmp_path: Path, form: Mapping[str, Any], name: str = "recipe.yml") -> tuple[str, Answer]:
        recipe = write_recipe(tmp_path, form, name)
        return recipe, build(recipe, "--store", tmp_path / "store")

    def test_stages_and_adapters_on_references_make_what_is_asked(self, siblings: Path, tmp_path: Path) -> None:
        recipe, answer = self.built(tmp_path, chain(siblings))
        computed = {name: stage["computed"] for name, stage in answer["stages"].items()}
        # The adapter changes two tensors of each layer; base+mood is the same as glad, so that nothing of it is made.
        assert computed == {"glad": 2 * 8, "soup": 75, "base+mood": 0, "out": 75}
        assert_as_cold(tmp_path, answer, recipe, "out")

    def test_without_keep_the_bits_are_the_same_and_the_store_holds_no_intermediate(
        self, siblings: Path, tmp_path: Path
    ) -> None:
        _, kept = self.built(tmp_path, chain(siblings))
        recipe = write_recipe(tmp_path / "fused", chain(siblings, keep=False))
        fused = build(recipe, "--store", tmp_path / "fused/store")
        assert contents(tmp_path / "out") | {"kittybuild.json": b"", "README.md": b""} == contents(
            tmp_path / "fused/out"
        ) | {"kittybuild.json": b"", "README.md": b""}
        assert manifest_of(kept, "out") == manifest_of(fused, "out")
        assert fused["stages"]["glad"]["computed"] == fused["stages"]["soup"]["computed"] == 0
        names = [name for path in (tmp_path / "fused/store/packs").rglob("*.safetensors") for name in names_in(path)]
        lora = [name for name in names if names.count(name) > 1]
        assert len(names) - len(lora) // 2 == 75  # only those of base+adapter, which is kept, are there twice
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in lora} == {"q_proj", "v_proj"}
        # And what was changed in a fused stage is made again, from nothing.
        recipe = write_recipe(tmp_path / "fused", chain(siblings, keep=False, weight=0.25))
        again = build(recipe, "--store", tmp_path / "fused/store")
        shutil.copytree(tmp_path / "fused/out", tmp_path / "out", dirs_exist_ok=True)
        cold = build(recipe, "-o", tmp_path / "other/out", "--store", tmp_path / "other/store")
        assert manifest_of(again, "out") == manifest_of(cold, "out")

    def test_a_change_that_gives_the_same_bits_upstream_stops_there(self, siblings: Path, tmp_path: Path) -> None:
        """A normalized mean with both weights halved: other parameters, the same bits."""
        _, first = self.built(tmp_path, chain(siblings, weight=0.5))
        recipe, answer = self.built(tmp_path, chain(siblings, weight=0.25))
        assert answer["stages"]["soup"]["computed"] == 75
        assert answer["stages"]["out"]["computed"] == 0
        assert answer["outputs"]["out"] == {**first["outputs"]["out"], "shards_written": 0, "shards_linked": 1}
        assert manifest_of(answer, "out") == manifest_of(first, "out")
        assert_as_cold(tmp_path, answer, recipe, "out")

    def test_a_change_at_the_beginning_goes_through_to_the_end(self, siblings: Path, tmp_path: Path) -> None:
        self.built(tmp_path, chain(siblings))
        recipe, answer = self.built(tmp_path, chain(siblings, adapter_weight=2.0))
        computed = {name: stage["computed"] for name, stage in answer["stages"].items()}
        assert computed == {"glad": 16, "soup": 16, "base+mood": 0, "out": 16}
        assert_as_cold(tmp_path, answer, recipe, "out")

    def test_a_lost_intermediate_is_made_again_only_where_it_is_needed(self, siblings: Path, tmp_path: Path) -> None:
        recipe, first = self.built(tmp_path, chain(siblings))
        output = {os.path.realpath(path) for path in (tmp_path / "out").glob("*.safetensors")}
        for path in (tmp_path / "store/packs").rglob("*.safetensors"):
            if not any(os.path.samefile(path, shard) for shard in output):
                path.unlink()
        answer = build(recipe, "--store", tmp_path / "store")
        assert sum(stage["computed"] for stage in answer["stages"].values()) == 0  # the output is all there
        form = chain(siblings)
        ties = form["stages"]["out"]["models"]
        ties[2]["parameters"] = {"weight": [{"filter": LAYER_5, "value": 0.7}, {"value": 0.6}], "density": 0.5}
        recipe, answer = self.built(tmp_path, form)
        computed = {name: stage["computed"] for name, stage in answer["stages"].items()}
        assert computed == {"glad": 2, "soup": 9, "base+mood": 0, "out": 9}
        assert_as_cold(tmp_path, answer, recipe, "out")
        assert first["stages"]["out"]["computed"] == 75


def names_in(pack: Path) -> list[str]:
    return [name for name, _ in read_pack_header(str(pack))[0].tensors]


class TestShortcut:
    """A build with nothing to do looks at a few facts only: none of these may be overlooked."""

    @pytest.fixture
    def args(self, models: Path, tmp_path: Path) -> tuple[Any, ...]:
        recipe = linear(tmp_path, {models / "base": 0.5, models / "happy": 0.5})
        args = (recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        build(*args)
        assert build(*args)["bytes"]["read"] == 0
        return args

    def test_a_changed_companion_file_is_taken_over(self, args: Any, models: Path, tmp_path: Path) -> None:
        (models / "base/generation_config.json").write_text('{"eos_token_id": 7}')
        answer = build(*args)
        assert answer["stages"]["merge"]["computed"] == 0
        assert (tmp_path / "out/generation_config.json").read_text() == '{"eos_token_id": 7}'
        assert_as_cold(tmp_path, answer, args[0])

    def test_a_new_and_a_deleted_companion_file_are_noticed(self, args: Any, models: Path, tmp_path: Path) -> None:
        (models / "base/chat_template.jinja").write_text("{{ messages }}")
        (models / "base/generation_config.json").unlink()
        answer = build(*args)
        assert (tmp_path / "out/chat_template.jinja").is_file()
        assert not (tmp_path / "out/generation_config.json").exists()
        assert_as_cold(tmp_path, answer, args[0])

    def test_a_changed_source_is_noticed(self, args: Any, models: Path, tmp_path: Path) -> None:
        change(models / "happy", "lm_head")
        answer = build(*args)
        assert answer["stages"]["merge"]["computed"] == 1
        assert_as_cold(tmp_path, answer, args[0])

    def test_a_source_whose_time_was_set_back_is_noticed(self, args: Any, models: Path, tmp_path: Path) -> None:
        file = models / "happy/model.safetensors"
        before = file.stat()
        change(models / "happy", "lm_head")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        answer = build(*args)
        assert answer["stages"]["merge"]["computed"] == 1
        assert_as_cold(tmp_path, answer, args[0])

    def test_a_changed_recipe_is_noticed(self, args: Any, models: Path, tmp_path: Path) -> None:
        recipe = linear(tmp_path, {models / "base": 0.5, models / "happy": 0.25})
        answer = build(*args)
        assert answer["stages"]["merge"]["computed"] == 75
        assert_as_cold(tmp_path, answer, recipe)

    def test_a_comment_in_the_recipe_changes_the_card_and_no_weight(self, args: Any, tmp_path: Path) -> None:
        text = "# for Ada\n" + Path(args[0]).read_text()
        Path(args[0]).write_text(text)
        answer = build(*args)
        assert answer["stages"]["merge"]["computed"] == 0
        assert (tmp_path / "out/mergekit_config.yml").read_text() == text
        assert "# for Ada" in (tmp_path / "out/README.md").read_text()

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "kittybuild.json"])
    def test_a_deleted_output_file_comes_back(self, name: str, args: Any, tmp_path: Path) -> None:
        before = contents(tmp_path / "out")
        (tmp_path / "out" / name).unlink()
        if name == "kittybuild.json":  # then the folder is not ours any more
            shutil.rmtree(tmp_path / "out")
        build(*args)
        assert contents(tmp_path / "out") == before

    def test_an_edited_output_file_is_replaced(self, args: Any, tmp_path: Path) -> None:
        before = contents(tmp_path / "out")
        (tmp_path / "out/config.json").write_text("{}")
        build(*args)
        assert contents(tmp_path / "out") == before

    def test_a_replaced_output_shard_is_put_back(self, args: Any, models: Path, tmp_path: Path) -> None:
        before = contents(tmp_path / "out")
        (tmp_path / "out/model.safetensors").unlink()
        shutil.copy(models / "base/model.safetensors", tmp_path / "out/model.safetensors")
        build(*args)
        assert contents(tmp_path / "out") == before

    def test_an_output_shard_edited_in_place_is_noticed_although_it_is_the_pack(
        self, args: Any, tmp_path: Path
    ) -> None:
        before = contents(tmp_path / "out")
        shard = tmp_path / "out/model.safetensors"
        shard.chmod(0o644)
        with open(shard, "r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"\x55")
        answer = build(*args)
        assert answer["stages"]["merge"]["computed"] == 1
        assert contents(tmp_path / "out") == before
        assert build(*args)["bytes"]["read"] == 0
