"""What comes from outside is wrong, does not fit, goes away or changes meanwhile: a clear error, or it simply works."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kittybuild import api
from kittybuild.builders.base import Block, Builder, Builders, Combine, Job
from kittybuild.builders.registry import BUILTIN
from kittybuild.errors import BuildError, SourceError
from kittybuild.store.store import Store
from tests.building import build, contents, fails, linear, manifest_of, packs
from tests.faults import assert_sound
from tests.helpers import load_tensors, pico_adapter, pico_llama, save_tensors, write_json, write_recipe

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siblings")
    pico_llama(folder / "base", 0)
    pico_llama(folder / "happy", 1, base=folder / "base")
    pico_adapter(folder / "mood", folder / "base", 2)
    return folder


@pytest.fixture
def models(siblings: Path, tmp_path: Path) -> Path:
    """Two siblings and an adapter, to be damaged by a test."""
    shutil.copytree(siblings, tmp_path / "models")
    return tmp_path / "models"


def change(model: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_tensors(model / "model.safetensors", edit(load_tensors(model)))


def rewrite_header(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def cut(model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 100)


def cut_inside_its_header(model: Path) -> None:
    os.truncate(model / "model.safetensors", 50)


def empty(model: Path) -> None:
    os.truncate(model / "model.safetensors", 0)


def lying_about_the_length(model: Path) -> None:
    with open(model / "model.safetensors", "r+b") as file:
        file.write(struct.pack("<Q", 1 << 62))


def lying_about_a_shape(model: Path) -> None:
    rewrite_header(model / "model.safetensors", lambda header: header[NORM].update(shape=[1 << 40]))


def lying_about_an_offset(model: Path) -> None:
    rewrite_header(model / "model.safetensors", lambda header: header[NORM].update(data_offsets=[0, 64]))


def indexed_outside_its_folder(model: Path) -> None:
    index = {"weight_map": {NORM: "../happy/model.safetensors"}}
    write_json(model / "model.safetensors.index.json", index)


def indexed_without_its_shards(model: Path) -> None:
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    write_json(model / "model.safetensors.index.json", index)


def with_a_config_that_is_no_json(model: Path) -> None:
    (model / "config.json").write_text("{")


def with_a_link_out_of_its_folder(model: Path) -> None:
    os.symlink("/etc/hostname", model / "tokenizer.json")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (shutil.rmtree, "KB201"),
        (without_weights, "KB205"),
        (cut, "KB202"),
        (cut_inside_its_header, "KB202"),
        (empty, "KB202"),
        (lying_about_the_length, "KB202"),
        (lying_about_a_shape, "KB202"),
        (lying_about_an_offset, "KB202"),
        (indexed_outside_its_folder, "KB204"),
        (indexed_without_its_shards, "KB205"),
        (with_a_config_that_is_no_json, "KB206"),
        (with_a_link_out_of_its_folder, "KB204"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_source_that_is(damage: Callable[[Path], None], code: str, args: Any, models: Path, tmp_path: Path) -> None:
    damage(models / "base")
    status, found, error = fails(*args)
    assert (status, found) == (4, code), error
    assert "models/base" in f"{error['at']} {error['message']}"
    assert not (tmp_path / "out").exists()
    assert packs(tmp_path / "store") == {}


class TestModelsThatDoNotFit:
    def test_other_shapes(self, args: Any, models: Path) -> None:
        change(models / "happy", lambda tensors: {**tensors, NORM: tensors[NORM][:-1]})
        status, code, error = fails(*args)
        assert (status, code) == (3, "KB301")
        assert f"{NORM}: {models / 'base'} BF16[32], {models / 'happy'} BF16[31]" in error["message"]

    @pytest.mark.parametrize("lacking", ["base", "happy"])
    def test_a_tensor_that_one_lacks(self, lacking: str, args: Any, models: Path) -> None:
        change(models / lacking, lambda tensors: {name: t for name, t in tensors.items() if name != NORM})
        status, code, error = fails(*args)
        assert (status, code) == (3, "KB302")
        assert error["message"].startswith(f"{models / lacking} lacks 1 tensor that ")
        assert NORM in error["message"]

    def test_layers_past_the_end(self, models: Path, tmp_path: Path) -> None:
        slices = [{"sources": [{"model": str(models / "base"), "layer_range": [1, 3]}]}]
        recipe = write_recipe(tmp_path, {"merge_method": "passthrough", "slices": slices})
        status, code, error = fails(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        assert (status, code) == (3, "KB303")
        assert error["at"].startswith(f"{recipe}:")
        assert "[0, 2)" in error["message"]

    def test_a_lora_for_a_base_of_another_size(self, models: Path, tmp_path: Path) -> None:
        pico_llama(tmp_path / "wide", 5, width=64)
        recipe = linear(tmp_path, {f"{tmp_path / 'wide'}+{models / 'mood'}": 1.0})
        assert fails(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")[:2] == (3, "KB301")

    def test_a_lora_for_more_layers_than_the_base_has(self, models: Path, tmp_path: Path) -> None:
        pico_llama(tmp_path / "short", 5, layers=1)
        recipe = linear(tmp_path, {f"{tmp_path / 'short'}+{models / 'mood'}": 1.0})
        assert fails(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")[:2] == (3, "KB306")


class TestBuffers:
    """Tensors of integers are taken where all models agree, and never averaged."""

    @staticmethod
    def with_buffer(model: Path, value: int) -> None:
        import torch

        change(model, lambda tensors: {**tensors, "model.position_ids": torch.arange(5) + value})

    def test_equal_ones_are_copied(self, args: Any, models: Path, tmp_path: Path) -> None:
        for name in ("base", "happy"):
            self.with_buffer(models / name, 3)
        build(*args)
        assert load_tensors(tmp_path / "out")["model.position_ids"].tolist() == [3, 4, 5, 6, 7]

    def test_different_ones_are_refused_by_name(self, args: Any, models: Path, tmp_path: Path) -> None:
        self.with_buffer(models / "base", 3)
        self.with_buffer(models / "happy", 4)
        status, code, error = fails(*args)
        assert (status, code, error["at"]) == (5, "KB503", "merge: model.position_ids")
        assert not (tmp_path / "out").exists()


class TestNotFinite:
    """An error, unless the stage allows it; then they are counted, in the first build and in every later one."""

    def spoil(self, model: Path) -> None:
        def change_two(tensors: dict[str, Any]) -> dict[str, Any]:
            tensors[NORM][3:5] = float("nan")
            tensors["lm_head.weight"][7, 7] = float("-inf")
            return tensors

        change(model, change_two)

    def recipe(self, folder: Path, model: Path, method: str, **more: Any) -> str:
        parameters = {"parameters": {"weight": 1.0}} if method == "linear" else {}
        form = {"merge_method": method, "models": [{"model": str(model)}], **parameters, **more}
        return write_recipe(folder, form, f"{method}-{len(more)}.yml")

    @pytest.mark.parametrize("method", ["linear", "passthrough"])
    def test_they_are_an_error_that_names_the_tensor(self, method: str, models: Path, tmp_path: Path) -> None:
        self.spoil(models / "base")
        recipe = self.recipe(tmp_path, models / "base", method)
        for _ in range(3):  # what one run finished, the next one has in the store
            status, code, error = fails(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
            assert (status, code, error["at"]) == (5, "KB508", "merge")
            assert NORM in error["message"] or "lm_head.weight" in error["message"]
            assert "allow_nan: true" in error["hint"]
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("method", ["linear", "passthrough"])
    def test_where_they_are_allowed_they_are_counted_by_name(self, method: str, models: Path, tmp_path: Path) -> None:
        self.spoil(models / "base")
        strict = self.recipe(tmp_path, models / "base", method)
        recipe = self.recipe(tmp_path, models / "base", method, allow_nan=True)
        for _ in range(2):  # computed, then known
            answer = build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
            assert answer["stages"]["merge"]["nonfinite"] == {NORM: 2, "lm_head.weight": 1}
        for _ in range(2):  # known, then from the manifest alone
            _, code, error = fails(strict, "-o", tmp_path / "other", "--store", tmp_path / "store")
            assert code == "KB508"
            assert f"{NORM}: 2" in error["message"]
            assert "lm_head.weight: 1" in error["message"]
            shutil.rmtree(tmp_path / "store" / "index")

    def test_a_stage_that_is_fused_is_no_way_around(self, models: Path, tmp_path: Path) -> None:
        self.spoil(models / "base")
        soup = {"merge_method": "linear", "models": [{"model": str(models / "base")}], "parameters": {"weight": 1.0}}
        later = {"merge_method": "linear", "models": [{"model": "soup"}], "parameters": {"weight": 1.0}}
        for allowed in (False, True):
            stages = {"soup": {**soup, "keep": False, "allow_nan": allowed}, "end": {**later, "allow_nan": True}}
            form = {"kittybuild": 1, "stages": stages, "outputs": {"end": {"folder": str(tmp_path / "out")}}}
            recipe = write_recipe(tmp_path, form, f"fused-{allowed}.yml")
            if allowed:
                answer = build(recipe, "--store", tmp_path / "store")
                assert answer["stages"]["end"]["nonfinite"] == {NORM: 2, "lm_head.weight": 1}
            else:
                assert fails(recipe, "--store", tmp_path / "store")[1:2] == ("KB508",)

    def test_a_person_is_warned(self, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        from kittybuild.cli import main

        change(models / "base", lambda tensors: {**tensors, NORM: tensors[NORM] / 0})
        recipe = linear(tmp_path, {models / "base": 1.0}, allow_nan=True)
        with pytest.raises(SystemExit) as done:
            main(["build", recipe, "-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")])
        assert done.value.code == 0
        assert f"{NORM} has 32 elements that are NaN or infinite" in capfd.readouterr().err


class Meanwhile:
    """A builder that does something once while it runs, as anybody else on the machine may."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def prepare(self, job: Job) -> Combine:
        combine = BUILTIN["linear"].prepare(job)

        def then(block: Block) -> Any:
            if self.action is not None:
                self.action, action = None, self.action
                action()
            return combine(block)

        return then

    def builders(self) -> Builders:
        others = [builder for builder in BUILTIN.by_class.values() if builder.name != "linear"]
        linear = BUILTIN["linear"]
        return Builders.of(*others, Builder("linear", 1, self.prepare, scratch=0, method=linear.method))


def build_while(action: Callable[[], None], recipe: str, tmp_path: Path) -> None:
    builders = Meanwhile(action).builders()
    prepared = api.prepare(api.read_recipe(recipe, builders), folder=str(tmp_path / "out"), builders=builders)
    with Store.open(str(tmp_path / "store")) as store:
        api.build(prepared, store, builders=builders)


class TestSourcesThatChangeMeanwhile:
    def test_new_bytes_are_an_error_and_nothing_of_them_is_remembered(
        self, recipe: str, args: Any, models: Path, tmp_path: Path
    ) -> None:
        file = models / "happy/model.safetensors"
        good = file.read_bytes()

        def overwrite() -> None:
            with open(file, "r+b") as opened:
                opened.seek(-2000, os.SEEK_END)
                opened.write(b"\x11" * 2000)

        with pytest.raises(SourceError) as caught:
            build_while(overwrite, recipe, tmp_path)
        assert (caught.value.code, caught.value.at) == ("KB210", str(file))
        assert not (tmp_path / "out").exists()
        for data in (file.read_bytes(), good):  # with the new file, and with the old one again
            file.write_bytes(data)
            answer = build(*args)
            cold = build(recipe, "-o", tmp_path / "cold/out", "--store", tmp_path / "cold/store")
            assert manifest_of(answer) == manifest_of(cold)
            assert contents(tmp_path / "out") == contents(tmp_path / "cold/out")

    @pytest.mark.parametrize("how", ["replaced", "deleted"])
    @pytest.mark.parametrize("file", ["happy/model.safetensors", "base/config.json", "base/generation_config.json"])
    def test_a_file_that_is(self, file: str, how: str, recipe: str, models: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copy(models / file, other)
        with pytest.raises(SourceError) as caught:
            build_while(
                lambda: os.replace(other, models / file) if how == "replaced" else os.unlink(models / file),
                recipe,
                tmp_path,
            )
        assert caught.value.code in ("KB201", "KB210")
        assert caught.value.at == str(models / file)
        assert not (tmp_path / "out").exists()

    def test_an_error_in_a_builder_names_the_tensor(self, recipe: str, tmp_path: Path) -> None:
        def fail() -> None:
            raise MemoryError("no room for 3 GB")

        with pytest.raises(BuildError, match="no room for 3 GB") as caught:
            build_while(fail, recipe, tmp_path)
        assert caught.value.code == "KB501"
        assert str(caught.value.at).startswith("merge: ")
        assert build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")["ok"]

    def test_a_person_who_interrupts_keeps_what_is_finished(self, recipe: str, args: Any, tmp_path: Path) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_while(interrupt, recipe, tmp_path)
        assert_sound(str(tmp_path / "store"))
        assert build(*args)["stages"]["merge"]["tensors"] == 21


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    for file, status, code in (("binary.yml", 3, "KB100"), ("absent.yml", 3, "KB100"), (".", 2, "KB000")):
        assert fails(tmp_path / file, "-o", tmp_path / "out")[:2] == (status, code)
