"""`kittybuild methods`, and methods and numerics that a command names: listed, planned, built."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from kittybuild.builders.registry import BUILTIN
from kittybuild.cli.reference import names, page
from tests.building import build, fresh
from tests.helpers import load_tensors, pico_llama, run_cli, write_recipe

PLUGIN = '''\
"""Every element from the model that is farthest from zero there."""

from kittybuild.builders.base import Builder
from kittybuild.model.method import Method


def prepare(job):
    import numpy as np

    def combine(block):
        first, *others = block.inputs
        for other in others:
            np.copyto(first, other, where=np.abs(other) > np.abs(first))
        return first

    return combine


LOUDEST = Builder("loudest", 0, prepare, scratch=8, method=Method("loudest", "Loudest", "", (), "ordinary"))
'''


class TestList:
    def test_every_method_is_listed_with_its_classes(self) -> None:
        done = fresh("methods")
        lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
        assert list(lines) == list(names(BUILTIN))
        for name, classes in lines.items():
            assert classes.split(", ") == [c for c in BUILTIN.classes() if BUILTIN.get(name, c)]

    def test_one_is_a_page(self) -> None:
        assert fresh("methods", "ties").stdout == page("ties", BUILTIN)

    def test_as_json(self) -> None:
        status, document = run_cli("methods", "ties")
        (ties,) = document["methods"]
        assert (status, document["ok"], ties["name"]) == (0, True, "ties")
        ours = ties["numerics"]["kitty-1"]
        assert (ours["base"], ours["paper"]) == ("required", "https://arxiv.org/abs/2306.01708")
        density = next(param for param in ours["params"] if param["name"] == "density")
        assert (density["scope"], density["kind"], density["default"], density["low"]) == ("input", "number", 1.0, 0.0)
        assert [method["name"] for method in run_cli("methods")[1]["methods"]] == list(names(BUILTIN))

    def test_an_unknown_one_is_answered_with_the_nearest(self) -> None:
        status, document = run_cli("methods", "tiess")
        assert (status, document["errors"][0]["code"]) == (2, "KB009")
        assert document["errors"][0]["hint"] == "did you mean 'ties'?"

    def test_it_loads_no_torch(self) -> None:
        done = fresh("methods", env={"PYTHONPROFILEIMPORTTIME": "1"})
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "kittybuild" in loaded
        assert not loaded & {"torch", "transformers", "numpy"}


class TestPlugins:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        pico_llama(tmp_path / "a", 1, dtype="float32")
        pico_llama(tmp_path / "b", 2, base=tmp_path / "a")
        write_recipe(tmp_path, {"merge_method": "loudest", "models": [{"model": "a"}, {"model": "b"}]})
        (tmp_path / "loudest.py").write_text(textwrap.dedent(PLUGIN), encoding="utf-8")
        return tmp_path

    def test_a_method_of_a_file_is_listed_planned_and_built(self, folder: Path) -> None:
        recipe, file = folder / "recipe.yml", folder / "loudest.py"
        assert "loudest" in fresh("methods", "--methods", file).stdout.split()
        assert run_cli("plan", recipe, "--store", folder / "store")[1]["errors"][0]["code"] == "KB104"
        status, plan = run_cli("plan", recipe, "--methods", file, "--store", folder / "store")
        assert (status, plan["stages"]["merge"]["computed"]) == (0, 21)
        build(str(recipe), "-o", folder / "out", "--methods", file, "--store", folder / "store")
        made, a, b = (load_tensors(folder / name) for name in ("out", "a", "b"))
        for name, tensor in made.items():
            assert torch.equal(tensor, torch.where(a[name].abs() >= b[name].abs(), a[name], b[name])), name

    def test_it_is_computed_again_when_its_source_changes_and_only_then(self, folder: Path) -> None:
        def computed() -> int:
            options = ("-o", folder / "out", "--methods", folder / "loudest.py", "--store", folder / "store")
            answer = build(str(folder / "recipe.yml"), *options)
            return int(answer["stages"]["merge"]["computed"])

        assert [computed(), computed()] == [21, 0]
        source = (folder / "loudest.py").read_text(encoding="utf-8")
        (folder / "loudest.py").write_text(source.replace("np.abs(other)", "np.abs(-other)"), encoding="utf-8")
        assert [computed(), computed()] == [21, 0]

    def test_a_file_that_fails_is_an_error_of_the_command(self, folder: Path) -> None:
        (folder / "loudest.py").write_text("1 / 0", encoding="utf-8")
        for words in (("plan", folder / "recipe.yml"), ("methods",)):
            status, document = run_cli(*words, "--methods", folder / "loudest.py")
            (error,) = document["errors"]
            assert (status, error["code"], error["at"]) == (2, "KB007", str(folder / "loudest.py"))


def test_numerics_may_be_named_by_the_command(tmp_path: Path) -> None:
    pico_llama(tmp_path / "a", 1)
    recipe = write_recipe(tmp_path, "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]")
    command = ("plan", recipe, "--explain", "model.norm.weight", "--store", tmp_path / "store")
    for numerics in BUILTIN.classes():
        status, document = run_cli(*command, "--numerics", numerics)
        assert status == 0
        assert document["explain"][0]["numerics"].partition(";")[0] == numerics
    status, document = run_cli(*command, "--numerics", "mergekit")
    assert (status, document["errors"][0]["code"]) == (2, "KB006")
