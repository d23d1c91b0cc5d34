"""Tables of models by token: what a merge made of them, and whether the output loads and speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers import load_tensors
from tests.tokenizers import Files

if TYPE_CHECKING:
    from torch import Tensor

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PLAIN = ("Hello the cat is singing.", "Größe 東京 🙂")


def ids(files: Files | Path) -> dict[str, int]:
    """The ids of all tokens, as transformers' library gives them."""
    from tokenizers import Tokenizer

    text = (files / "tokenizer.json").read_bytes() if isinstance(files, Path) else files["tokenizer.json"]
    return Tokenizer.from_str(text.decode()).get_vocab(with_added_tokens=True)  # type: ignore[no-any-return]


def rows_of(folder: Path) -> dict[str, Tensor]:
    """The embedding's rows by token."""
    table = load_tensors(folder)[EMBED]
    return {token: table[number] for token, number in ids(folder).items() if number < len(table)}


def assert_rows(out: Path, models: Path, *, lead: str, weights: Mapping[str, float]) -> None:
    """Every row is the weighted sum of the models' rows, where one has none with that of the lead, else of another."""
    import torch

    numbers, found = ids(out), load_tensors(out)
    for name in (EMBED, HEAD):
        tables, having = {}, {}
        for model in weights:
            table, own = load_tensors(models / model)[name], ids(models / model)
            rows = torch.tensor([row if (row := own.get(token, -1)) < len(table) else -1 for token in numbers])
            having[model] = (rows >= 0).unsqueeze(1)
            tables[model] = table[rows.clamp(min=0)]
        instead = torch.zeros_like(tables[lead])
        for model in (*(other for other in weights if other != lead), lead):
            instead = torch.where(having[model], tables[model], instead)
        wanted = sum(w * torch.where(having[model], tables[model], instead) for model, w in weights.items())
        assert isinstance(wanted, torch.Tensor)
        assert torch.equal(found[name][list(numbers.values())], wanted), name


def assert_speaks(out: Path, texts: Sequence[str] = PLAIN) -> Any:
    """The folder loads with transformers, whose tokenizer brings texts back; returns the tokenizer."""
    import torch
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
