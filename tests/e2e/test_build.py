"""The command `build` as a stranger sees it: its JSON, its exit status, where it looks and what it puts there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from kittybuild.digest import Digest
from kittybuild.store.pack import read_pack_header
from tests.building import build, contents, fails, fresh, linear, manifest_of
from tests.helpers import load_tensors, pico_adapter, pico_llama, run_cli, write_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer in two shards, two siblings, and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "base", 0, shards=2, tokenizer=True)
    pico_llama(folder / "happy", 1, base=folder / "base")
    pico_llama(folder / "calm", 2, base=folder / "base")
    pico_adapter(folder / "mood", folder / "base", 3)
    (folder / "base/deep").mkdir()
    (folder / "base/deep/notes.txt").write_bytes(b"\x00\xff kept as it is")
    return folder


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> str:
    return linear(tmp_path, {models / "base": 0.4, models / "happy": 0.6})


@pytest.fixture
def several(models: Path, tmp_path: Path) -> str:
    """A recipe with an intermediate stage, two outputs, and a stage that nobody asks for."""
    half = {"weight": 0.5}
    pair = [{"model": "glad", "parameters": half}, {"model": "calm", "parameters": half}]
    stages = {
        "glad": {"kind": "apply_lora", "base": "base", "adapters": [{"adapter": "mood"}]},
        "soup": {"merge_method": "linear", "models": pair},
        "copy": {"merge_method": "passthrough", "models": [{"model": "calm"}]},
        "spare": {"merge_method": "passthrough", "models": [{"model": "happy", "parameters": {"scale": 2.0}}]},
    }
    return write_recipe(
        tmp_path / "recipes",
        {
            "kittybuild": 1,
            "name": "several",
            "sources": {name: {"path": str(models / name)} for name in ("base", "happy", "calm", "mood")},
            "stages": stages,
            "outputs": {"soup": {"folder": "out/soup", "shard_size": "40KB"}, "copy": {"folder": "out/copy"}},
        },
    )


class TestJson:
    def test_a_build_answers_what_the_contract_says(self, recipe: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        answer = build(recipe, "-o", out, "--store", tmp_path / "store")
        assert set(answer) == {"ok", "stages", "outputs", "bytes", "downloaded", "seconds", "peak_rss", "notes"}
        stage = answer["stages"].pop("merge")
        assert answer["stages"] == {}
        assert Digest(stage.pop("manifest"))
        assert stage == {"tensors": 21, "computed": 21, "cached": 0, "fetched": 0, "nonfinite": {}}
        assert answer["outputs"] == {"merge": {"folder": str(out), "shards_written": 1, "shards_linked": 0}}
        size = (out / "model.safetensors").stat().st_size
        weights = sum(tensor.nbytes for tensor in load_tensors(out).values())
        assert answer["bytes"]["written"] == size
        assert 2 * weights <= answer["bytes"]["read"] < 2.05 * weights  # a few are read to see if the store knows them
        assert 0 < answer["seconds"] < 60
        assert answer["peak_rss"] > 1_000_000
        assert answer["notes"] == []

    def test_the_second_build_computes_nothing_and_links_every_shard(self, several: str, tmp_path: Path) -> None:
        first = build(several, "--store", tmp_path / "store")
        second = build(several, "--store", tmp_path / "store")
        assert {name: stage["computed"] for name, stage in second["stages"].items()} == {
            "glad": 0,
            "soup": 0,
            "copy": 0,
        }
        for name, stage in second["stages"].items():
            assert stage["cached"] == stage["tensors"]
            assert stage["manifest"] == first["stages"][name]["manifest"]
        for name, output in second["outputs"].items():
            assert output["shards_written"] == 0
            assert output["shards_linked"] == first["outputs"][name]["shards_written"] > 0
        assert second["bytes"] == {"read": 0, "written": 0}

    def test_standard_output_is_one_document_and_the_rest_goes_to_standard_error(
        self, models: Path, tmp_path: Path
    ) -> None:
        recipe = linear(tmp_path, {models / "base": 1.0}, parameters={"t": 0.5})
        done = fresh("build", recipe, "-o", tmp_path / "out", "--store", tmp_path / "store", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["notes"] != []
        done = fresh("build", recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        assert "merge: 21 tensors, 0 computed, 21 from the store" in done.stdout
        assert "linear has no parameter 't'" in done.stderr

    def test_a_build_with_nothing_to_do_loads_neither_torch_nor_numpy(self, recipe: str, tmp_path: Path) -> None:
        args = (recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        build(*args)
        done = fresh("build", *args, "--json", env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert json.loads(done.stdout)["stages"]["merge"]["computed"] == 0
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "kittybuild" in loaded
        assert not loaded & {"torch", "transformers", "numpy", "gguf", "tokenizers", "safetensors", "huggingface_hub"}


@pytest.mark.parametrize(
    "words", [("build",), ("build", "x.yml", "--memory", "lots"), ("build", "x.yml", "--jobs", "0"), ("buld",)], ids=str
)
def test_words_that_the_command_line_does_not_know_are_a_document_too(words: tuple[str, ...]) -> None:
    status, answer = run_cli(*words)
    assert (status, answer["ok"]) == (2, False)
    (error,) = answer["errors"]
    assert error["code"] == "KB000"
    assert error["message"]
    assert "--help" in error["hint"]


def failing_recipes(models: Path, folder: Path) -> dict[str, tuple[str, int, str]]:
    """What is wrong -> recipe, exit status, code."""
    pico_llama(folder / "wider", 9, width=64)
    good = {models / "base": 1.0}
    return {
        "words": (linear(folder, good, "words.yml"), 2, "KB001"),
        "method": (linear(folder, good, "method.yml", merge_method="linea"), 3, "KB104"),
        "shapes": (linear(folder, {**good, folder / "wider": 1.0}, "shapes.yml"), 3, "KB301"),
        "source": (linear(folder, {**good, folder / "nowhere": 1.0}, "source.yml"), 4, "KB201"),
        "folder": (linear(folder, good, "folder.yml"), 5, "KB504"),
        "store": (linear(folder, good, "store.yml"), 7, "KB702"),
    }


@pytest.mark.parametrize("kind", ["words", "method", "shapes", "source", "folder", "store"])
def test_each_kind_of_failure_has_its_exit_status_and_one_document(kind: str, models: Path, tmp_path: Path) -> None:
    recipe, status, code = failing_recipes(models, tmp_path)[kind]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/thesis.txt").write_text("all my work")
    if kind == "store":
        (tmp_path / "store").mkdir()
        (tmp_path / "store/FORMAT").write_text("kittybuild-store 99\n")
    stages = ["mergee"] if kind == "words" else []
    out = tmp_path / ("theirs" if kind == "folder" else "out")
    done = run_cli("build", recipe, *stages, "-o", out, "--store", tmp_path / "store")
    assert done[0] == status
    assert set(done[1]) == {"ok", "errors"}
    assert done[1]["ok"] is False
    for error in done[1]["errors"]:
        assert set(error) == {"code", "message", "at", "hint"}
        assert error["code"] == code
        assert error["at"]
        assert error["message"]
    assert contents(tmp_path / "theirs") == {"thesis.txt": b"all my work"}
    assert not (tmp_path / "out").exists()


def test_every_problem_of_a_recipe_is_in_the_answer(models: Path, tmp_path: Path) -> None:
    recipe = linear(tmp_path, {models / "base": 1.0}, merge_method="linea", dtype="bfloat15", base_modl="x")
    status, answer = run_cli("build", recipe, "-o", tmp_path / "out")
    assert status == 3
    assert {error["code"] for error in answer["errors"]} == {"KB102", "KB103", "KB104"}
    assert all(error["at"].startswith(f"{recipe}:") for error in answer["errors"])


class TestWhere:
    def test_outputs_are_beside_the_recipe(self, several: str, tmp_path: Path) -> None:
        answer = build(several, "--store", tmp_path / "store")
        here = tmp_path / "recipes/out"
        assert {name: out["folder"] for name, out in answer["outputs"].items()} == {
            "soup": str(here / "soup"),
            "copy": str(here / "copy"),
        }
        assert {path.name for path in here.iterdir()} == {"soup", "copy"}
        assert len(list((here / "soup").glob("model-*.safetensors"))) > 1

    def test_a_stage_by_name_is_built_alone_with_what_it_needs(self, several: str, tmp_path: Path) -> None:
        answer = build(several, "copy", "--store", tmp_path / "store")
        assert set(answer["stages"]) == set(answer["outputs"]) == {"copy"}
        answer = build(several, "soup", "copy", "--store", tmp_path / "store")
        assert set(answer["stages"]) == {"glad", "soup", "copy"}

    def test_a_stage_without_an_output_is_built_into_the_store_or_into_a_folder_named_for_it(
        self, several: str, tmp_path: Path
    ) -> None:
        store = tmp_path / "store"
        answer = build(several, "spare", "--store", store)
        assert answer["outputs"] == {}
        assert answer["stages"]["spare"]["computed"] == 21
        answer = build(several, "spare", "-o", tmp_path / "here", "--store", store)
        assert answer["stages"]["spare"]["computed"] == 0
        assert (tmp_path / "here/model.safetensors").is_file()

    def test_one_folder_for_two_stages_is_refused(self, several: str, tmp_path: Path) -> None:
        assert fails(several, "-o", tmp_path / "out")[:2] == (2, "KB002")

    def test_a_bare_recipe_needs_a_folder(self, recipe: str) -> None:
        assert fails(recipe)[:2] == (2, "KB004")

    def test_the_store_is_the_option_else_the_environment_else_that_of_the_settings(
        self, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "kittybuild.yml").write_text("store: kept/here\n")
        out = tmp_path / "out"

        def made() -> set[str]:
            return {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("FORMAT")}

        monkeypatch.delenv("KITTYBUILD_STORE", raising=False)
        build(recipe, "-o", out)
        assert made() == {"kept/here"}
        monkeypatch.setenv("KITTYBUILD_STORE", str(tmp_path / "environment"))
        build(recipe, "-o", out)
        assert made() == {"kept/here", "environment"}
        build(recipe, "-o", out, "--store", tmp_path / "option")
        assert made() == {"kept/here", "environment", "option"}

    def test_without_any_of_these_it_is_in_the_users_cache(
        self, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("KITTYBUILD_STORE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        build(recipe, "-o", tmp_path / "out")
        assert (tmp_path / "cache/kittybuild/store/FORMAT").is_file()

    def test_settings_that_say_something_else_are_an_error(self, recipe: str, tmp_path: Path) -> None:
        (tmp_path / "kittybuild.yml").write_text("store: [a, b]\n")
        assert fails(recipe, "-o", tmp_path / "out")[:2] == (3, "KB103")


class TestFolder:
    def test_every_file_of_the_folder_is_listed_and_nothing_else_is_there(self, models: Path, tmp_path: Path) -> None:
        recipe = linear(tmp_path, {models / "base": 0.4, models / "happy": 0.6}, base_model=str(models / "base"))
        answer = build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        out = tmp_path / "out"
        names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        names |= {"special_tokens_map.json", "deep/notes.txt"}
        ours = {"model.safetensors", "README.md", "mergekit_config.yml", "kittybuild.json"}
        assert set(contents(out)) == names | ours
        story = json.loads((out / "kittybuild.json").read_text())
        assert set(story["files"]) == names | ours
        assert story["manifest_digest"] == manifest_of(answer)
        assert story["stage"] == "merge"
        assert story["recipe"] == {"dialect": "mergekit", "numerics": None, "text": Path(recipe).read_text()}
        assert {tensor[0] for tensor in story["manifest"]["tensors"]} == set(load_tensors(out))
        assert all(Digest(tensor[-1]) for tensor in story["manifest"]["tensors"])
        assert {name for name, _, _ in story["manifest"]["files"]} == names
        pins = story["lock"]["sources"]
        assert set(pins) == {str(models / "base"), str(models / "happy")}
        assert all(pin["read"] == 21 and Digest(pin["content"]) for pin in pins.values())

    def test_companion_files_are_the_donors_byte_for_byte(self, models: Path, tmp_path: Path) -> None:
        recipe = linear(tmp_path, {models / "base": 0.4, models / "happy": 0.6})
        build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        theirs, ours = contents(models / "base"), contents(tmp_path / "out")
        kept = {name for name in theirs if "safetensors" not in name}
        assert "deep/notes.txt" in kept
        assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}

    def test_shards_have_an_index_that_tells_where_each_tensor_is(self, several: str, tmp_path: Path) -> None:
        build(several, "soup", "--store", tmp_path / "store")
        out = tmp_path / "recipes/out/soup"
        index = json.loads((out / "model.safetensors.index.json").read_text())
        held = {}
        for path in sorted(out.glob("*.safetensors")):
            layout, _ = read_pack_header(str(path))
            held.update(dict.fromkeys((name for name, _ in layout.tensors), path.name))
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_tensors(out).values())
        count = len(set(held.values()))
        assert set(held.values()) == {f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)}
        assert not (out / "mergekit_config.yml").exists()

    def test_shards_are_the_packs_themselves(self, recipe: str, tmp_path: Path) -> None:
        build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        (pack,) = (tmp_path / "store/packs").rglob("*.safetensors")
        assert os.path.samefile(pack, tmp_path / "out/model.safetensors")

    def test_the_card_begins_as_the_hub_wants_it(self, several: str, tmp_path: Path) -> None:
        build(several, "soup", "--store", tmp_path / "store")
        text = (tmp_path / "recipes/out/soup/README.md").read_text()
        _, front, body = text.split("---\n", 2)
        assert yaml.safe_load(front) == {
            "base_model": [],
            "library_name": "transformers",
            "tags": ["mergekit", "merge", "kittybuild"],
        }
        assert body.startswith("# soup\n")
        assert "- `glad`: LoRA `mood` × 1 on `base`" in body
        assert "spare" not in body.partition("## Configuration")[0]
        assert Path(several).read_text() in body

    def test_the_recipe_of_a_plain_merge_goes_with_it(self, recipe: str, tmp_path: Path) -> None:
        build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        assert (tmp_path / "out/mergekit_config.yml").read_bytes() == Path(recipe).read_bytes()


class TestConfig:
    @staticmethod
    def frankenmerge(models: Path, folder: Path, **more: object) -> str:
        slices = [
            {"sources": [{"model": str(models / "base"), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(models / "happy"), "layer_range": [0, 1]}]},
        ]
        return write_recipe(folder, {"merge_method": "passthrough", "slices": slices, **more})

    def test_a_merge_that_changes_nothing_of_it_leaves_it_as_it_is(self, models: Path, tmp_path: Path) -> None:
        odd = b'{"model_type" : "llama",\n\n\t"hidden_size": 32, "torch_dtype":"bfloat16"}'
        pico_llama(tmp_path / "odd", 5, base=models / "base")
        (tmp_path / "odd/config.json").write_bytes(odd)
        recipe = linear(tmp_path, {tmp_path / "odd": 1.0, models / "happy": 1.0})
        build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        assert (tmp_path / "out/config.json").read_bytes() == odd

    def test_another_number_of_layers_and_another_dtype_are_written_into_it(self, models: Path, tmp_path: Path) -> None:
        recipe = self.frankenmerge(models, tmp_path, dtype="float32")
        build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        before = json.loads((models / "base/config.json").read_text())
        after = json.loads((tmp_path / "out/config.json").read_text())
        assert after == {**before, "num_hidden_layers": 3, "torch_dtype": "float32"}
        assert {str(tensor.dtype) for tensor in load_tensors(tmp_path / "out").values()} == {"torch.float32"}

    @pytest.mark.parametrize("kind", ["linear", "franken", "shards"])
    def test_transformers_loads_it_without_a_missing_or_unexpected_weight(
        self, kind: str, models: Path, several: str, tmp_path: Path
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        recipe = {
            "linear": lambda: linear(tmp_path, {models / "base": 0.4, models / "happy": 0.6}),
            "franken": lambda: self.frankenmerge(models, tmp_path),
            "shards": lambda: several,
        }[kind]()
        stage = ["soup"] if kind == "shards" else []
        out = tmp_path / "loaded"
        build(recipe, *stage, "-o", out, "--store", tmp_path / "store")
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert {key: len(value) for key, value in info.items() if value} == {}
        tensors = load_tensors(out)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name
        words = AutoTokenizer.from_pretrained(out)("w1 w2 w3", return_tensors="pt")
        assert torch.isfinite(model(input_ids=words["input_ids"]).logits).all()
