"""Merges of models with different vocabularies: every row is the one of its token, and the output loads and speaks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.building import Answer, build
from tests.helpers import load_tensors
from tests.tokenizers import Files, byte_level, files_of, model_with

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
BASE = files_of(byte_level(["Ġthe", "Ġcat"], ["<s>", "</s>"]), {"bos_token": "<s>", "eos_token": "</s>"})
CHAT = files_of(
    byte_level(["Ġthe", "ing"], ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]),
    {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE},
)
TEXTS = ("Hello the cat is singing.", "Größe 東京 🙂", "<|im_start|>user the thing<|im_end|></s>")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with other tokens, in float32 so that rows are told exactly."""
    folder = tmp_path_factory.mktemp("models")
    model_with(folder / "base", 0, BASE, dtype="float32")
    model_with(folder / "chat", 1, CHAT, dtype="float32")
    return folder


def ids(files: Files | Path) -> dict[str, int]:
    """The ids of all tokens, as transformers' library gives them."""
    from tokenizers import Tokenizer

    text = (files / "tokenizer.json").read_bytes() if isinstance(files, Path) else files["tokenizer.json"]
    return Tokenizer.from_str(text.decode()).get_vocab(with_added_tokens=True)  # type: ignore[no-any-return]


def recipe(models: Path, folder: Path, *, weights: Sequence[float] = (1.0, 0.0), **more: Any) -> str:
    """A bare mergekit file: a linear merge of the two."""
    uses = [{"model": str(models / n), "parameters": {"weight": w}} for n, w in zip(("base", "chat"), weights)]  # noqa: B905
    text = {"merge_method": "linear", "models": uses, "parameters": {"normalize": False}} | more
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yml").write_text(yaml.safe_dump(text, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return str(folder / "recipe.yml")


def merged(models: Path, tmp_path: Path, **more: Any) -> tuple[Path, Answer]:
    """The output of a merge, and what the build said."""
    answer = build(recipe(models, tmp_path, **more), "-o", tmp_path / "out", "--store", tmp_path / "store")
    return tmp_path / "out", answer


def rows_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Each table's rows by token."""
    tensors, numbers = load_tensors(folder), ids(folder)
    return {name: {t: tensors[name][n] for t, n in numbers.items() if n < len(tensors[name])} for name in (EMBED, HEAD)}


def assert_rows(out: Path, models: Path, *, lead: str, weights: Mapping[str, float]) -> None:
    """Every row is the weighted sum of the models' rows, where one has none with that of the other."""
    found, tables = rows_of(out), {name: rows_of(models / name) for name in weights}
    for name in (EMBED, HEAD):
        for token, row in found[name].items():
            having = {model: rows[name][token] for model, rows in tables.items() if token in rows[name]}
            instead = having.get(lead, next(iter(having.values())))
            wanted = sum(weight * having.get(model, instead) for model, weight in weights.items())
            assert torch.equal(row, wanted), (name, token)  # type: ignore[arg-type]


def assert_speaks(out: Path, texts: Sequence[str] = TEXTS) -> Any:
    """The folder loads with transformers, whose tokenizer brings texts back; returns the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    for text in texts:
        numbers = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        assert tokenizer.decode(numbers[0], clean_up_tokenization_spaces=False) == text
        assert torch.isfinite(model(numbers).logits).all()
    return tokenizer


def test_union_has_the_tokens_of_all_each_with_its_rows(models: Path, tmp_path: Path) -> None:
    out, answer = merged(models, tmp_path, tokenizer_source="union", weights=(0.25, 0.5))
    tokens = ids(out)
    assert set(tokens) == {*ids(BASE), *ids(CHAT)}
    assert {token: tokens[token] for token in ids(BASE)} == ids(BASE)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(tokens)
    assert_rows(out, models, lead="base", weights={"base": 0.25, "chat": 0.5})
    assert_speaks(out)
    assert "merge/tables of" in " ".join(answer["stages"])
