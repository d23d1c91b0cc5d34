"""A model with another model's tokenizer, built from a recipe: tables, config, files, and what transformers says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.building import build, contents, fails
from tests.helpers import load_tensors, write_recipe
from tests.surgery import EMBEDDING, HEAD, WIDTH, tokenizers, write

PORTABLE = ("mean", "zero", "randn", "subword", "common_interpolation")
OTHERS = ("omp", "john_hewitt", "landmark_pca", "stb", "mp_rope")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name, files in tokenizers().items():
        write(tmp_path, name, files, fillers=5 if name == "one" else 0)
    return tmp_path


def recipe(folder: Path, **options: object) -> str:
    stage = {"kind": "transplant_tokenizer", "model": "one", "donor": "two", "approximation_method": "mean", **options}
    text = {"kittybuild": 1, "stages": {"out": stage}, "outputs": {"out": {"folder": "out"}}}
    return write_recipe(folder, text)


@pytest.mark.parametrize("method", [*PORTABLE, *OTHERS])
def test_the_model_loads_and_speaks_the_donors_tokens(models: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build(recipe(models, approximation_method=method, k=8), "--store", models / "store")
    model = AutoModelForCausalLM.from_pretrained(models / "out")
    tokenizer, donors = (AutoTokenizer.from_pretrained(models / name) for name in ("out", "two"))
    text = " they only catch this"
    ids = tokenizer(text)["input_ids"]
    assert ids == donors(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    assert model.config.vocab_size == len(donors) == model.get_input_embeddings().weight.shape[0]
    assert (model.config.eos_token_id, model.config.pad_token_id) == (donors.eos_token_id, None)
    assert model.generation_config.eos_token_id == donors.eos_token_id


def test_shared_rows_are_the_models_own_and_the_rest_is_the_models(models: Path) -> None:
    build(recipe(models), "--store", models / "store")
    one, made = load_tensors(models / "one"), load_tensors(models / "out")
    ids, theirs = (
        json.loads((models / name / "tokenizer.json").read_bytes())["model"]["vocab"] for name in ("one", "two")
    )
    for name in (EMBEDDING, HEAD):
        for token, row in theirs.items():
            wanted = one[name][ids[token]] if token in ids else one[name].double().mean(0).float()
            assert torch.equal(made[name][row], wanted), token
    assert all(torch.equal(made[name], one[name]) for name in one if name not in (EMBEDDING, HEAD))


def test_the_files_are_the_donors(models: Path) -> None:
    (models / "two" / "chat_template.jinja").write_text("{{ messages }}")
    (models / "one" / "merges.txt").write_text("#version: 0.2\n")
    build(recipe(models), "--store", models / "store")
    out, donor = contents(models / "out"), contents(models / "two")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert out[name] == donor[name]
    assert "merges.txt" not in out


@pytest.mark.parametrize("method", [*PORTABLE, *OTHERS])
def test_a_donor_with_the_same_tokenizer_changes_nothing(models: Path, method: str) -> None:
    write(models, "same", tokenizers()["one"], fillers=5)
    build(recipe(models, donor="same", approximation_method=method), "--store", models / "store")
    one, made = load_tensors(models / "one"), load_tensors(models / "out")
    assert all(torch.equal(made[name], one[name]) for name in one)


def test_a_second_build_computes_nothing_and_another_scale_computes_tables_only(models: Path) -> None:
    build(recipe(models), "--store", models / "store")
    again = build(recipe(models), "--store", models / "store")
    assert again["stages"]["out"]["computed"] == 0
    scaled = build(recipe(models, new_vocab_scale=0.5), "--store", models / "store")
    assert scaled["stages"]["out"]["computed"] == 2


def test_tables_tie_as_the_models_do(models: Path) -> None:
    write(models, "tied", tokenizers()["one"], tie=True)
    build(recipe(models, model="tied", approximation_method="common_interpolation", k=8), "--store", models / "store")
    assert HEAD not in load_tensors(models / "out")
    write(models, "two", tokenizers()["two"], tie=True)
    build(recipe(models, approximation_method="common_interpolation", k=8), "--store", models / "store")
    assert load_tensors(models / "out")[HEAD].shape == (len(load_tensors(models / "two")[EMBEDDING]), WIDTH)


def test_a_stage_goes_on_where_a_transplant_ends(models: Path) -> None:
    stages = {
        "there": {"kind": "transplant_tokenizer", "model": "one", "donor": "two", "approximation_method": "mean"},
        "back": {"kind": "transplant_tokenizer", "model": "there", "donor": "one", "approximation_method": "mean"},
    }
    text = {"kittybuild": 1, "stages": stages, "outputs": {"back": {"folder": "out"}}}
    build(write_recipe(models, text), "--store", models / "store")
    assert contents(models / "out")["tokenizer.json"] == contents(models / "one")["tokenizer.json"]
    assert len(load_tensors(models / "out")[EMBEDDING]) == len(load_tensors(models / "one")[EMBEDDING])


def test_a_donor_without_a_tokenizer_is_an_error(models: Path) -> None:
    for file in (models / "two").glob("tokenizer*"):
        file.unlink()
    assert fails(recipe(models), "--store", models / "store")[:2] == (3, "KB340")


def test_unknown_options_are_errors_with_the_nearest_word(models: Path) -> None:
    status, code, error = fails(recipe(models, prefixmatch="yes"), "--store", models / "store")
    assert (status, code) == (3, "KB102")
    assert "prefix_match" in error["hint"]
