"""The mixture of the quickstart's two moods on real weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.building import build

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "two-moods.yml"
pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_the_mixture_loads_whole_and_answers_in_sentences(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = build(RECIPE, "-o", tmp_path / "moods", "--store", tmp_path / "store")
    assert report["stages"]["moods"]["tensors"] == 2 + 30 * (6 + 1 + 2 * 3)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moods", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "MixtralForCausalLM"
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moods")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens, skip_special_tokens=True).startswith("The capital of France is Paris")
