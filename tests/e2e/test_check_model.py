"""`build --check-model`: an output that its config.json does not describe is an error with exit status 6."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.building import build, fails, linear
from tests.helpers import load_tensors, pico_llama, save_tensors, write_json


@pytest.fixture
def args(tmp_path: Path) -> tuple[str | Path, ...]:
    """A merge of two siblings, whose base may still be changed."""
    pico_llama(tmp_path / "a", 1)
    recipe = linear(tmp_path, {tmp_path / "a": 1.0})
    return recipe, "-o", tmp_path / "out", "--store", tmp_path / "store", "--check-model"


def test_a_whole_model_passes(args: tuple[str | Path, ...]) -> None:
    assert build(*args)["notes"] == []


def test_weights_that_are_missing_too_many_or_of_another_shape_are_named(
    args: tuple[str | Path, ...], tmp_path: Path
) -> None:
    tensors = load_tensors(tmp_path / "a")
    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_tensors(tmp_path / "a" / "model.safetensors", tensors)
    status, code, error = fails(*args)
    assert (status, code) == (6, "KB601")
    for row in ("model.norm.weight is missing", "extra.weight has no place", "lm_head.weight has another shape"):
        assert row in error["message"]


def test_a_config_that_makes_no_model_is_an_error(args: tuple[str | Path, ...], tmp_path: Path) -> None:
    file = tmp_path / "a" / "config.json"
    write_json(file, {**json.loads(file.read_text()), "num_attention_heads": "many"})
    assert fails(*args)[:2] == (6, "KB601")


def test_a_class_that_transformers_does_not_know_is_a_note(args: tuple[str | Path, ...], tmp_path: Path) -> None:
    file = tmp_path / "a" / "config.json"
    config = {**json.loads(file.read_text()), "architectures": ["NovelForCausalLM"], "auto_map": {"AutoModel": "x.Y"}}
    write_json(file, config)
    (note,) = build(*args)["notes"]
    assert "the model was not checked: transformers" in note
    assert note.endswith("has no class NovelForCausalLM")
