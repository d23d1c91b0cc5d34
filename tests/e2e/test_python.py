"""The Python API: the examples of docs/python.md run, tensors and models are those of the folder that a build makes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kittybuild
from kittybuild.compat import run_merge
from kittybuild.errors import KittybuildError
from tests.building import build, linear
from tests.helpers import load_tensors, pico_llama, write_model
from tests.unit.test_docs import ROOT, blocks, page, rows, words

SOUP = {
    "merge_method": "linear",
    "models": [{"model": "models/a"}, {"model": "models/b"}],
    "parameters": {"weight": 0.5},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pico_llama(tmp_path / "models/a", 1, layers=4)
    pico_llama(tmp_path / "models/b", 2, base=tmp_path / "models/a")
    linear(tmp_path, {"models/a": 0.5, "models/b": 0.5}, "soup.yml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_run(here: Path) -> None:
    names: dict[str, Any] = {}
    for place, text in blocks("python", ROOT / "docs/python.md"):
        exec(compile(text, place, "exec"), names)
    made = load_tensors(here / "out/soup")
    assert torch.equal(names["norm"], made["model.norm.weight"])
    assert names["shapes"] == {name: tuple(tensor.shape) for name, tensor in made.items()}
    assert names["report"].notes[0].startswith("cuda: ")
    assert load_tensors(here / "out/again").keys() == made.keys()


def test_the_calls_take_what_is_told() -> None:
    for cell, _ in rows(page("python.md")):
        name, _, given = words(cell)[0].rstrip(")").partition("(")
        call = run_merge if name.endswith("run_merge") else getattr(kittybuild, name.removeprefix("kittybuild."))
        told = {word.strip().rstrip("=") for word in given.split(",")}
        real = set(inspect.signature(call).parameters) - {"config_source", "more"}
        assert {"config" if word == "merge_config" else word for word in real} == told


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_a_stage_has_the_tensors_of_its_folder(here: Path, framework: Any) -> None:
    with kittybuild.open_checkpoint("soup.yml", "merge", framework=framework, store="store") as tensors:
        build("soup.yml", "-o", "out", "--store", here / "store")
        wanted = load_tensors(here / "out")
        assert sorted(tensors) == sorted(wanted)
        for name, tensor in tensors.items():
            found = torch.from_numpy(tensor.view(np.int16)).view(torch.bfloat16) if framework == "numpy" else tensor
            assert torch.equal(found, wanted[name]), name
        assert tensors.file("config.json") == (here / "out/config.json").read_bytes()
        assert tensors.file("no.json") is None


def test_nothing_but_the_store_is_written(here: Path) -> None:
    before = {path.name for path in here.iterdir()}
    kittybuild.load_model(SOUP, "merge", store="store")
    assert {path.name for path in here.iterdir()} - before == {"store"}


def test_a_loaded_model_is_the_one_in_the_folder(here: Path) -> None:
    from transformers import AutoModelForCausalLM

    build("soup.yml", "-o", "out", "--store", here / "store")
    loaded = kittybuild.load_model("soup.yml", "merge", store="store")
    wanted = AutoModelForCausalLM.from_pretrained(here / "out")
    ids = torch.tensor([[1, 5, 9]])
    assert loaded.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(loaded(ids).logits, wanted(ids).logits)
    assert loaded.generation_config.eos_token_id == wanted.generation_config.eos_token_id
    again = kittybuild.load_model("out")
    assert torch.equal(again(ids).logits, wanted(ids).logits)


def test_a_model_that_does_not_fit_its_config_is_an_error(here: Path) -> None:
    tensors = load_tensors(here / "models/a")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    config = json.loads((here / "models/a/config.json").read_text(encoding="utf-8"))
    write_model(here / "less", tensors, config)
    with pytest.raises(KittybuildError, match="up_proj") as caught:
        kittybuild.load_model("less")
    assert caught.value.code == "KB601"


class Dumped:
    """As mergekit's pydantic models are."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump(self, *, mode: str = "python", exclude_none: bool = False) -> dict[str, Any]:
        return {name: value for name, value in self.fields.items() if not (exclude_none and value is None)}


def test_run_merge_takes_mergekits_own_objects(here: Path) -> None:
    config = Dumped(**SOUP, base_model=None, slices=None, dtype=None)
    options = Dumped(out_shard_size=50_000, random_seed=None, allow_crimes=False, quiet=False)
    report = run_merge(config, "out", options, store="store")
    build("soup.yml", "-o", "built", "--store", here / "other")
    made, wanted = load_tensors(here / "out"), load_tensors(here / "built")
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert report.outputs["merge"].shards_written == 2


def test_an_option_that_nobody_has_is_an_error(here: Path) -> None:
    with pytest.raises(TypeError, match="no option 'speed'"):
        run_merge(SOUP, "out", speed=11, store="store")
