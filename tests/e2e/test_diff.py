"""`kittybuild diff`: what differs between two checkpoints is found, measured and named; what does not, is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.building import build, fresh, linear
from tests.helpers import load_tensors, pico_llama, run_cli, save_tensors, write_json, write_recipe

if TYPE_CHECKING:
    from torch import Tensor

UP = "model.layers.1.mlp.up_proj.weight"
PATTERN = "model.layers.*.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "base", 0, tokenizer=True)
    pico_llama(folder / "happy", 1, base=folder / "base", tokenizer=True)
    pico_llama(folder / "full", 0, dtype="float32", tokenizer=True)
    return folder


@pytest.fixture
def pair(models: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model and its copy, to be changed."""
    return models / "base", Path(shutil.copytree(models / "base", tmp_path / "copy"))


def compared(a: Path, b: Path, *args: str) -> tuple[int, dict[str, Any]]:
    return run_cli("diff", a, b, *args)


def differing(a: Path, b: Path, *args: str) -> dict[str, Any]:
    status, document = compared(a, b, *args)
    assert (status, document["ok"], document["equal"]) == (6, False, False), document
    assert [error["code"] for error in document["errors"]] == ["KB608"]
    return document


def none_of(_: object) -> None:
    """What a change in place is worth."""


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Write the model anew, changed."""
    tensors = load_tensors(folder)
    change(tensors)
    save_tensors(folder / "model.safetensors", tensors)


class TestTensors:
    def test_equal_models_are_equal_however_they_are_cut(self, models: Path, tmp_path: Path) -> None:
        pico_llama(tmp_path / "cut", 0, shards=3, tokenizer=True)
        for a, b in ((models / "base", models / "base"), (models / "base", tmp_path / "cut")):
            status, document = compared(a, b)
            assert (status, document["ok"], document["equal"]) == (0, True, True)
            assert document["tensors"]["identical"] == 21
            assert (document["differences"], document["files"], document["tokens"]) == ([], [], None)

    def test_the_measures_are_those_of_float64(self, models: Path) -> None:
        document = differing(models / "base", models / "happy")
        found = {one["tensor"]: one for one in document["differences"]}
        one, two = (load_tensors(models / name)[UP].double().numpy() for name in ("base", "happy"))
        apart = one - two
        assert found[UP]["how"] == "close"
        assert found[UP]["max_abs"] == np.abs(apart).max()
        assert found[UP]["relative"] == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(one), rel=1e-12)
        assert found[UP]["cosine"] == pytest.approx(
            (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two), rel=1e-12
        )
        assert (found[UP]["elements"], found[UP]["of"]) == (int((apart != 0).sum()), apart.size)

    def test_blocks_and_threads_change_nothing_but_the_last_bits(self, models: Path) -> None:
        whole = differing(models / "base", models / "happy")["differences"]
        small = differing(models / "base", models / "happy", "--memory", "1KB", "--jobs", "3")["differences"]
        for one, two in zip(whole, small, strict=True):
            exact = ("tensor", "how", "ulps", "elements", "of", "max_abs")
            assert [one[key] for key in exact] == [two[key] for key in exact]
            assert one["relative"] == pytest.approx(two["relative"], rel=1e-12)

    def test_one_step_of_one_element(self, pair: tuple[Path, Path]) -> None:
        def nudge(tensors: dict[str, Tensor]) -> None:
            import torch

            tensors[UP].view(torch.int16)[3, 5] += 2

        edit(pair[1], nudge)
        document = differing(*pair)
        (one,) = document["differences"]
        assert (one["tensor"], one["how"], one["ulps"], one["elements"]) == (UP, "close", 2, 1)
        (pattern,) = document["patterns"]
        assert (pattern["pattern"], pattern["tensors"], pattern["apart"]) == (PATTERN, 2, 1)
        assert pattern["max_abs"] == one["max_abs"] > 0
        assert compared(*pair, "--within", "1")[0] == 6
        assert compared(*pair, "--within", "2")[0] == 0

    def test_nan_is_counted_and_left_out(self, pair: tuple[Path, Path]) -> None:
        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors[UP][0, 0] = float("nan")
            tensors[UP][0, 1] += 1

        edit(pair[1], spoil)
        (one,) = differing(*pair, "--within", "9999999")["differences"]
        assert (one["how"], one["ulps"], one["elements"], one["nonfinite"]) == ("different", None, 2, 1)
        assert one["max_abs"] == pytest.approx(1, abs=0.01)

    def test_a_tensor_of_zeros_has_no_ratio(self, pair: tuple[Path, Path]) -> None:
        edit(pair[1], lambda tensors: none_of(tensors[NORM].zero_()))
        (there,) = differing(*pair)["differences"]
        assert (there["relative"], there["cosine"]) == (1.0, None)
        (back,) = differing(pair[1], pair[0])["differences"]
        assert (back["relative"], back["cosine"]) == (None, None)

    def test_another_dtype_is_measured_too(self, models: Path) -> None:
        document = differing(models / "base", models / "full")
        assert document["tensors"]["other_dtype"] == 21
        assert all(0 < one["relative"] < 0.01 for one in document["differences"])
        assert {one["ulps"] for one in document["differences"]} == {None}
        (config,) = document["files"]
        assert config == {
            "name": "config.json",
            "how": "other",
            "keys": [{"key": "torch_dtype", "a": '"bfloat16"', "b": '"float32"'}],
        }

    def test_missing_more_and_reshaped(self, pair: tuple[Path, Path]) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.more"] = tensors.pop("lm_head.weight")
            tensors[UP] = tensors[UP][:-1]

        edit(pair[1], change)
        found = {one["tensor"]: one["how"] for one in differing(*pair)["differences"]}
        assert found == {UP: "other shape", "lm_head.weight": "only a", "lm_head.more": "only b"}


class TestFiles:
    def test_configs_by_key_and_others_by_name(self, pair: tuple[Path, Path]) -> None:
        config = json.loads((pair[1] / "config.json").read_text(encoding="utf-8"))
        del config["rope_theta"]
        write_json(pair[1] / "config.json", {**config, "rope": {"theta": 5}, "vocab_size": 64})
        (pair[1] / "generation_config.json").unlink()
        (pair[1] / "modeling.py").write_text("pass", encoding="utf-8")
        (pair[1] / "README.md").write_text("hello", encoding="utf-8")
        document = differing(*pair)
        assert [(file["name"], file["how"]) for file in document["files"]] == [
            ("config.json", "other"),
            ("generation_config.json", "only a"),
            ("modeling.py", "only b"),
        ]
        keys = {key["key"]: (key["a"], key["b"]) for key in document["files"][0]["keys"]}
        assert keys == {"rope_theta": ("10000.0", None), "rope": (None, '{"theta": 5}')}
        assert document["tensors"]["identical"] == 21

    def test_tokens_and_chat_template(self, pair: tuple[Path, Path]) -> None:
        text = (pair[1] / "tokenizer.json").read_text(encoding="utf-8")
        (pair[1] / "tokenizer.json").write_text(text.replace('"w7"', '"w7b"'), encoding="utf-8")
        (pair[1] / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
        document = differing(*pair)
        assert document["tokens"] == {"only_a": 1, "only_b": 1, "moved": 0}
        assert document["chat_template"] == "other"
        assert {file["name"]: file["keys"] for file in document["files"]} == {
            "chat_template.jinja": [],
            "tokenizer.json": [],
        }


class TestOutputs:
    @pytest.fixture
    def outputs(self, models: Path, tmp_path: Path) -> Callable[..., Path]:
        """Builds a mean of the two models."""

        def made(name: str, weight: float, *args: str) -> Path:
            recipe = linear(tmp_path / name, {models / "base": 0.5, models / "happy": weight})
            build(recipe, "-o", tmp_path / name / "out", "--store", tmp_path / "store", *args)
            return tmp_path / name / "out"

        return made

    def test_a_parameter_is_the_cause(self, outputs: Callable[..., Path]) -> None:
        document = differing(outputs("one", 0.5), outputs("two", 0.25))
        (change,) = document["recipe"]
        assert (change["what"], change["a"], change["b"]) == ("models[1].parameters.weight", "0.5", "0.25")
        assert document["cause"].endswith(": its parameters are others")
        assert document["files"] == []

    def test_numerics_are_a_cause(self, outputs: Callable[..., Path]) -> None:
        document = differing(outputs("one", 0.3), outputs("two", 0.3, "--numerics", "mergekit-0.1.5"))
        assert ": the numerics was kitty-1, now it is mergekit-0.1.5" in document["cause"]

    def test_a_source_is_a_cause(self, outputs: Callable[..., Path], models: Path, tmp_path: Path) -> None:
        one = outputs("one", 0.5)
        kept = Path(shutil.copytree(one, tmp_path / "kept"))
        copies = tmp_path / "models"
        shutil.copytree(models, copies)
        recipe = linear(tmp_path / "two", {copies / "base": 0.5, copies / "happy": 0.5})
        build(recipe, "-o", tmp_path / "two/out", "--store", tmp_path / "store")
        assert compared(kept, tmp_path / "two/out")[0] == 0
        edit(copies / "happy", lambda tensors: none_of(tensors[NORM].add_(1)))
        build(recipe, "-o", tmp_path / "three/out", "--store", tmp_path / "store")
        document = differing(tmp_path / "two/out", tmp_path / "three/out")
        assert document["cause"] == f"the source {copies}/happy holds other tensors"
        assert [one["tensor"] for one in document["differences"]] == [NORM]

    def test_what_was_changed_afterwards_has_no_derivation(self, outputs: Callable[..., Path], tmp_path: Path) -> None:
        one = outputs("one", 0.5)
        other = Path(shutil.copytree(one, tmp_path / "other"))
        (other / "model.safetensors").chmod(0o644)
        edit(other, lambda tensors: none_of(tensors[NORM].add_(1)))
        assert "changed after it was built" in differing(one, other)["cause"]

    def test_stages_are_compared_as_the_store_keeps_them(self, models: Path, tmp_path: Path) -> None:
        uses = {"weight": [{"filter": UP, "value": 0.75}, {"value": 0.5}]}
        soups = {
            name: {"merge_method": "linear", "models": [{"model": "base", "parameters": {"weight": 0.5}}, happy]}
            for name, happy in (
                ("one", {"model": "happy", "parameters": {"weight": 0.5}}),
                ("two", {"model": "happy", "parameters": uses}),
            )
        }
        sources = {name: {"path": str(models / name)} for name in ("base", "happy")}
        outputs = {name: {"folder": name} for name in soups}
        form = {"kittybuild": 1, "sources": sources, "stages": soups, "outputs": outputs}
        recipe = write_recipe(tmp_path, form)
        store = ("--store", str(tmp_path / "store"))
        (error,) = compared(Path(f"{recipe}:one"), tmp_path / "two", *store)[1]["errors"]
        assert error["code"] == "KB711"
        build(recipe, "one", *store)
        (error,) = compared(Path(f"{recipe}:two"), tmp_path / "one", *store)[1]["errors"]
        assert (error["code"], error["hint"]) == ("KB020", f"`kittybuild build {recipe} two` makes it")
        build(recipe, *store)
        (error,) = compared(Path(recipe), tmp_path / "one", *store)[1]["errors"]
        assert (error["code"], error["hint"]) == ("KB001", f"name it: {recipe}:one")
        assert compared(Path(f"{recipe}:one"), tmp_path / "one", *store)[0] == 0
        document = differing(tmp_path / "one", Path(f"{recipe}:two"), *store)
        assert [one["tensor"] for one in document["differences"]] == [UP]
        assert document["cause"] == f"{UP}: its parameters are others"

    def test_a_damaged_telling_is_a_note(self, outputs: Callable[..., Path], tmp_path: Path) -> None:
        one = outputs("one", 0.5)
        other = Path(shutil.copytree(one, tmp_path / "other"))
        story = json.loads((other / "kittybuild.json").read_text(encoding="utf-8"))
        write_json(other / "kittybuild.json", {**story, "lock": [1]})
        assert compared(other, outputs("two", 0.25))[0] == 6
        (other / "kittybuild.json").write_text("{}", encoding="utf-8")
        status, document = compared(one, other)
        assert status == 0
        assert any("KB602" in note for note in document["notes"])


def test_single_files(models: Path) -> None:
    files = [models / name / "model.safetensors" for name in ("base", "happy")]
    assert differing(*files)["tensors"]["close"] == 21
    assert compared(files[0], files[0])[0] == 0


def test_what_is_no_checkpoint_is_an_error_of_a_source(models: Path, tmp_path: Path) -> None:
    status, document = compared(models / "base", tmp_path / "nothing")
    assert (status, document["errors"][0]["code"][:3]) == (4, "KB2")


def test_for_a_person(models: Path) -> None:
    done = fresh("diff", models / "base", models / "happy")
    assert done.returncode == 6
    lines = done.stdout.splitlines()
    assert lines[0] == "0 of 21 tensors are bit-identical"
    assert any(line.startswith(f"  {PATTERN}: 2 of 2 differ, max abs 0.") for line in lines)
    assert "error: " in done.stderr
    assert "KB608: they differ in 21 of 21 tensors" in done.stderr
    assert fresh("diff", models / "base", models / "base").stdout == "21 of 21 tensors are bit-identical\n"
