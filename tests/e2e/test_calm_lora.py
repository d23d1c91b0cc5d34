"""The adapter of rank 16 that recipes/quickstart/calm-lora.yml extracts of a real merge: PEFT loads it, and speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.building import build
from tests.helpers import write_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
QUESTIONS = ("What is the capital of France?", "I lost my keys this morning.")
pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three outputs, and the base as a folder."""
    folder = tmp_path_factory.mktemp("calm-lora")
    text = (QUICKSTART / "calm-lora.yml").read_text(encoding="utf-8").replace("adapters/", f"{QUICKSTART}/adapters/")
    text += "  base-model: {folder: out/base}\n"
    text = text.replace("outputs:", "  base-model: {merge_method: passthrough, models: [{model: base}]}\noutputs:")
    build(write_recipe(folder, text), "--store", folder / "store")
    return folder / "out"


def answers(model: Any, folder: Path) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        found.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return found


def test_the_adapter_is_small_and_keeps_most_of_the_merge(folder: Path) -> None:
    report = json.loads((folder / "calm-lora" / "extraction.json").read_text(encoding="utf-8"))
    assert {module["rank"] for module in report["modules"].values()} == {16}
    assert report["kept_energy"] > 0.9
    size = (folder / "calm-lora" / "adapter_model.safetensors").stat().st_size
    assert size < 12_000_000


def test_peft_answers_with_the_adapter_as_the_merge_does(folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merge = answers(AutoModelForCausalLM.from_pretrained(folder / "calm-f32"), folder / "calm-f32")
    assert "Paris" in merge[0]
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    plain = answers(base, folder / "base")
    adapted = PeftModel.from_pretrained(base, str(folder / "calm-lora"))
    back = AutoModelForCausalLM.from_pretrained(folder / "calm-back")
    with torch.no_grad():
        tokens = torch.arange(100, 130)[None]
        assert torch.allclose(adapted(tokens).logits, back(tokens).logits, atol=2e-3)
    assert answers(adapted, folder / "base") == merge != plain
