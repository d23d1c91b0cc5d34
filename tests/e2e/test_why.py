"""`kittybuild why`: every cause is named with its place, and the tensors that it concerns are those that are built."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.building import build, contents, fresh, linear
from tests.helpers import load_tensors, pico_adapter, pico_llama, run_cli, save_tensors, write_recipe

HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors"}
UP, Q = "model.layers.2.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"
TEXT = """\
kittybuild: 1
defaults: {{dtype: float32, seed: {seed}}}
sources:
  base: {{path: base}}
  happy: {{path: happy}}
  mood: {{path: mood}}
stages:
  glad: {{kind: apply_lora, base: base, adapters: [{{adapter: mood, weight: {mood}}}]}}
  soup:
    merge_method: {method}
    base_model: base
    models:
      - {{model: glad, parameters: {{weight: [{{filter: attn, value: 0.1}}, {{layers: 1..3, value: [0.5, {end}]}}]}}}}
      - {{model: happy, parameters: {{density: 0.75}}}}
    parameters:
      weight: 0.25
outputs:
  soup: {{folder: out}}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, a recipe and what was built of it."""
    folder = tmp_path_factory.mktemp("why")
    pico_llama(folder / "base", 0, layers=4, dtype="float32")
    pico_llama(folder / "happy", 1, base=folder / "base")
    pico_adapter(folder / "mood", folder / "base", 2)
    build(say(folder), "--store", folder / "store")
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """The same, to be changed: copies keep their times, but are other files, so they are built once more."""
    shutil.copytree(built, tmp_path / "copy", symlinks=True)
    build(tmp_path / "copy/recipe.yml", "--store", tmp_path / "copy/store")
    return tmp_path / "copy"


def say(folder: Path, **words: Any) -> str:
    """The recipe, with some of its words changed."""
    plain = {"seed": 0, "mood": 0.25, "method": "ties", "end": 1.0}
    return write_recipe(folder, TEXT.format(**{**plain, **words}))


def why(folder: Path, *args: str | Path, recipe: str = "recipe.yml") -> dict[str, Any]:
    status, document = run_cli("why", folder / recipe, "--store", folder / "store", *args)
    assert (status, document["ok"]) == (0, True), document
    return document


def soup_of(folder: Path, *args: str | Path) -> dict[str, Any]:
    found = why(folder, *args)["outputs"]["soup"]
    assert isinstance(found, dict)
    return found


def brief(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Each cause: its kind, what it is, was and now, and how many tensors it concerns and are computed."""
    return [
        (one["kind"], one["what"], one["was"], one["now"], one["tensors"], one["computed"]) for one in found["causes"]
    ]


def assert_so_built(folder: Path, found: dict[str, Any], *args: str) -> None:
    """A build computes as many tensors as `why` says, and after it nothing is changed."""
    stages = build(folder / "recipe.yml", "--store", folder / "store", *args)["stages"]
    assert sum(stage["computed"] for stage in stages.values()) == found["computed"]
    assert soup_of(folder, *args)["changed"] is False


class TestTheRecipe:
    def test_the_same_recipe_changes_nothing(self, folder: Path) -> None:
        before = contents(folder)
        say(folder)
        document = why(folder)
        assert document["changed"] is False
        soup = document["outputs"]["soup"]
        assert (soup["causes"], soup["computed"], soup["cached"]) == ([], 0, 39)
        assert soup["last"] == str(folder / "out/kittybuild.json")
        after = contents(folder)
        assert {name for name in before if before[name] != after[name] and "/index/" not in name} == set()

    def test_a_comment_changes_nothing(self, folder: Path) -> None:
        with open(folder / "recipe.yml", "a", encoding="utf-8") as recipe:
            recipe.write("# a comment\n")
        assert why(folder)["outputs"]["soup"]["causes"] == []

    def test_the_end_of_a_gradient_changes_what_it_reaches(self, folder: Path) -> None:
        say(folder, end=0.7)
        soup = soup_of(folder)
        (cause,) = soup["causes"]
        assert cause["at"] == f"{folder}/recipe.yml:13:73"
        assert cause["what"] == "weight of glad"
        assert (cause["kind"], cause["tensors"], cause["computed"], soup["computed"]) == ("recipe", 10, 10, 10)
        assert [float(end) for end in cause["was"].split(" to ")] == pytest.approx([2 / 3, 5 / 6])
        assert {(stage, name.split(".")[2]) for stage, name, _ in cause["names"]} == {("soup", "1"), ("soup", "2")}
        assert not any("attn" in name for _, name, _ in cause["names"])
        assert_so_built(folder, soup)

    def test_an_adapters_weight_reaches_through_stages(self, folder: Path) -> None:
        say(folder, mood=0.5)
        soup = soup_of(folder)
        assert brief(soup) == [("recipe", "weight of mood", "0.25", "0.5", 16, 16)]
        assert soup["causes"][0]["at"] == f"{folder}/recipe.yml:8:51"
        assert {stage for stage, _, _ in soup["causes"][0]["names"]} == {"glad", "soup"}
        assert_so_built(folder, soup)

    def test_two_causes_are_told_apart(self, folder: Path) -> None:
        say(folder, mood=0.5, end=0.7)
        soup = soup_of(folder)
        assert [(what, computed) for _, what, _, _, _, computed in brief(soup)] == [
            ("weight of mood", 16),
            ("weight of glad", 10),
        ]
        assert soup["computed"] == 26
        assert_so_built(folder, soup)

    def test_another_method(self, folder: Path) -> None:
        say(folder, method="task_arithmetic")
        soup = soup_of(folder)
        assert brief(soup) == [("recipe", "soup: merge_method", "ties", "task_arithmetic", 39, 39)]
        assert soup["causes"][0]["at"] == f"{folder}/recipe.yml:10:19"
        assert_so_built(folder, soup)

    def test_the_seed_matters_only_where_something_is_drawn(self, folder: Path) -> None:
        say(folder, seed=1)
        assert soup_of(folder)["causes"] == []
        say(folder, method="dare_ties")
        build(folder / "recipe.yml", "--store", folder / "store")
        say(folder, method="dare_ties", seed=1)
        soup = soup_of(folder)
        assert brief(soup) == [("recipe", "defaults.seed", "0", "1", 39, 39)]
        assert_so_built(folder, soup)

    def test_going_back_takes_all_from_the_store(self, folder: Path) -> None:
        say(folder, mood=0.5)
        build(folder / "recipe.yml", "--store", folder / "store")
        say(folder)
        soup = soup_of(folder)
        assert brief(soup) == [("recipe", "weight of mood", "0.5", "0.25", 16, 0)]
        assert (soup["computed"], soup["shards_to_write"], soup["shards_to_link"]) == (0, 0, 1)
        assert_so_built(folder, soup)

    def test_numerics_of_the_command(self, folder: Path) -> None:
        soup = soup_of(folder, "--numerics", "mergekit-0.1.5")
        assert {cause["kind"] for cause in soup["causes"]} == {"recipe"}
        assert ("kitty-1", "mergekit-0.1.5") in {
            (cause["was"], str(cause["now"]).partition(";")[0]) for cause in soup["causes"]
        }
        assert soup["computed"] == 39

    def test_a_model_that_came_to_it(self, folder: Path) -> None:
        pico_llama(folder / "third", 7, base=folder / "base")
        text = TEXT.format(seed=0, mood=0.25, method="ties", end=1.0)
        write_recipe(folder, text.replace("density: 0.75}}", "density: 0.75}}\n      - {model: third}"))
        soup = soup_of(folder)
        (cause, *more) = soup["causes"]
        assert (cause["what"], cause["was"]) == ("soup: models[2]", None)
        assert cause["at"] == f"{folder}/recipe.yml:15:9"
        assert all("glad" in one["what"] or "happy" in one["what"] or "third" in one["what"] for one in more)
        assert_so_built(folder, soup)


class TestTheWorld:
    def test_a_source_that_was_only_touched(self, folder: Path) -> None:
        os.utime(folder / "happy/model.safetensors")
        soup = soup_of(folder)
        (cause,) = soup["causes"]
        assert (cause["kind"], cause["at"]) == ("source", f"{folder}/recipe.yml:5:10")
        assert "what model.safetensors holds is not known here" in cause["what"]
        assert soup["computed"] == 39, "nobody knows yet that it is the same"

    def test_a_source_that_holds_something_else(self, folder: Path) -> None:
        tensors = load_tensors(folder / "happy")
        save_tensors(folder / "happy/model.safetensors", {**tensors, UP: tensors[UP] + 1})
        build(folder / "recipe.yml", "--store", folder / "store", "-o", folder / "elsewhere")
        soup = soup_of(folder)
        assert brief(soup) == [("source", "the source happy: model.safetensors holds other tensors", None, None, 1, 0)]
        assert soup["causes"][0]["names"] == [["soup", UP, "cached"]]

    def test_a_builder_and_a_machine(self, folder: Path) -> None:
        story = json.loads((folder / "out/kittybuild.json").read_text(encoding="utf-8"))
        made = story["derivations"]["soup"][UP]
        story["derivations"]["soup"][UP] = [made[0], 0, *made[2:3], "0" * 64, made[4]]
        other = story["derivations"]["soup"][Q]
        story["derivations"]["soup"][Q] = [*other[:2], "kitty-1;torch 1.0 VAX", "0" * 64, other[4]]
        (folder / "out/kittybuild.json").write_text(json.dumps(story), encoding="utf-8")
        say(folder, seed=1)
        found = {(kind, what): (was, now, count) for kind, what, was, now, count, _ in brief(soup_of(folder))}
        assert found["version", "version of ties"] == ("0", str(made[1]), 1)
        assert found["machine", "the machine"] == ("torch 1.0 VAX", "", 1)

    def test_another_tokenizer(self, tmp_path: Path) -> None:
        """Which row goes where follows from the tokenizers' files: no text of the recipe, and no weight, is another."""
        pico_llama(tmp_path / "base", 0, tokenizer=True)
        pico_llama(tmp_path / "happy", 1, base=tmp_path / "base", tokenizer=True)
        tokenizer = tmp_path / "happy/tokenizer.json"
        text = tokenizer.read_text(encoding="utf-8")
        tokenizer.write_text(text.replace('"w7"', '"w7b"'), encoding="utf-8")
        weights = {tmp_path / "base": 0.5, tmp_path / "happy": 0.5}
        recipe = linear(tmp_path, weights, tokenizer_source="union")
        args = ("-o", tmp_path / "out", "--store", tmp_path / "store")
        build(recipe, *args)
        tokenizer.write_text(text.replace('"w8"', '"w8b"'), encoding="utf-8")
        found = why(tmp_path, "-o", tmp_path / "out")["outputs"]["merge"]
        assert {cause["kind"] for cause in found["causes"]} == {"files"}, found["causes"]
        names = {name for cause in found["causes"] for _, name, _ in cause["names"]}
        assert names == {"lm_head.weight", "model.embed_tokens.weight"}
        assert "tokenizer.json" in found["files"]
        stages = build(recipe, *args)["stages"]
        assert sum(stage["computed"] for stage in stages.values()) == found["computed"] > 0

    def test_what_the_store_has_lost(self, folder: Path) -> None:
        shutil.rmtree(folder / "store/packs")
        (folder / "store/packs").mkdir()
        soup = soup_of(folder)
        assert [cause["kind"] for cause in soup["causes"]] == ["store"]
        assert soup["computed"] >= 39
        assert_so_built(folder, soup)

    def test_a_folder_that_is_gone_is_remembered_by_the_store(self, folder: Path) -> None:
        shutil.rmtree(folder / "out")
        say(folder, mood=0.5)
        soup = soup_of(folder)
        assert soup["last"] == f"the store {folder}/store"
        assert [cause["kind"] for cause in soup["causes"]] == ["recipe"]
        assert (soup["causes"][0]["tensors"], soup["computed"]) == (16, 16)

    def test_a_recipe_that_cannot_be_read_any_more_is_compared_as_text(self, folder: Path) -> None:
        text = TEXT.format(seed=0, mood=0.25, method="ties", end=0.7)
        shutil.move(folder / "happy", folder / "joy")
        write_recipe(folder, text.replace("happy", "joy"))
        soup = soup_of(folder)
        assert {cause["kind"] for cause in soup["causes"]} == {"recipe"}
        assert {cause["what"] for cause in soup["causes"]} >= {"soup: models[1].model"}
        assert soup["changed"] is True


class TestOneTensor:
    def test_its_chain_leads_to_the_first_cause(self, folder: Path) -> None:
        say(folder, mood=0.5)
        ((link,),) = why(folder, "--tensor", Q)["outputs"].values()
        assert (link["stage"], link["done"], link["causes"]) == ("soup", "computed", [])
        assert link["key"] is None
        assert len(link["was"]) == 64
        (inner,) = link["from"]
        assert (inner["stage"], inner["tensor"], inner["from"]) == ("glad", Q, [])
        assert [(cause["what"], cause["now"]) for cause in inner["causes"]] == [("weight of mood", "0.5")]

    def test_one_that_did_not_change(self, folder: Path) -> None:
        say(folder, mood=0.5)
        ((*links,),) = why(folder, "--tensor", UP)["outputs"].values()
        assert all((link["done"], link["causes"], link["from"]) == ("cached", [], []) for link in links)

    def test_one_that_is_not_there(self, folder: Path) -> None:
        status, document = run_cli("why", folder / "recipe.yml", "--tensor", "nothing", "--store", folder / "store")
        assert (status, document["errors"][0]["code"]) == (2, "KB005")


def test_without_a_last_build(built: Path, tmp_path: Path) -> None:
    soup = why(built, "--store", tmp_path / "nowhere", "-o", tmp_path / "never")["outputs"]["soup"]
    assert (soup["last"], soup["changed"], soup["causes"]) == (None, True, [])
    assert soup["computed"] == soup["tensors"] > 39
    assert not (tmp_path / "nowhere").exists()


def test_a_bare_mergekit_configuration(built: Path, tmp_path: Path) -> None:
    """Its build is found by the folder that is named, and by the store where none is."""
    recipe = linear(tmp_path, {built / "base": 0.5, built / "happy": 0.5})
    build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    linear(tmp_path, {built / "base": 0.5, built / "happy": 0.25})
    for args in ((), ("-o", tmp_path / "out")):
        found = why(tmp_path, *args)["outputs"]["merge"]
        assert [(one["was"], one["now"], one["tensors"]) for one in found["causes"]] == [("0.5", "0.25", 39)]


def test_companion_files_that_are_others(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "base", tmp_path / "base")
    recipe = linear(tmp_path, {tmp_path / "base": 0.5, built / "happy": 0.5})
    build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    (tmp_path / "base/generation_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "base/NOTICE").write_text("new", encoding="utf-8")
    found = why(tmp_path, "-o", tmp_path / "out")["outputs"]["merge"]
    assert set(found["files"]) >= {"generation_config.json"}
    assert (found["changed"], found["causes"], found["computed"]) == (True, [], 0)


def test_for_a_person_without_anything_large(folder: Path) -> None:
    say(folder, mood=0.5)
    done = fresh("why", folder / "recipe.yml", "--store", folder / "store", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"soup ({folder}/out): 47 tensors: 16 to compute, 31 from the store",
        f"  {folder}/recipe.yml:8:51: weight of mood was 0.25, now 0.5",
        "    16 tensors: 16 to compute, 0 from the store",
        "  shards: 1 to write, 0 to link",
    ]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "kittybuild" in loaded
    assert not loaded & HEAVY
    say(folder)
    assert (
        "nothing changed since the last build"
        in fresh("why", folder / "recipe.yml", "--store", folder / "store").stdout
    )
