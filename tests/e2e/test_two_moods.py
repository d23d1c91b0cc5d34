"""The mixture of the quickstart's two moods on real weights: its experts differ, and its router knows them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.building import build
from tests.helpers import load_tensors

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "two-moods.yml"
PROMPTS = [e["positive_prompts"] for e in yaml.safe_load(RECIPE.read_text("utf-8"))["stages"]["moods"]["experts"]]
LAYERS = 30
pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("two-moods")
    report = build(RECIPE, "-o", top / "moods", "--store", top / "store")
    assert report["stages"]["moods"]["tensors"] == 2 + LAYERS * (6 + 1 + 2 * 3)
    return top / "moods"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_mixture_answers_in_sentences(model: Any, tokenizer: Any) -> None:
    import torch

    assert type(model).__name__ == "MixtralForCausalLM"
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens, skip_special_tokens=True).startswith("The capital of France is Paris")


def test_every_matrix_of_one_expert_is_another_than_that_of_the_other(folder: Path) -> None:
    tensors = load_tensors(folder)
    pairs = [(name, name.replace(".experts.0.", ".experts.1.")) for name in tensors if ".experts.0." in name]
    assert len(pairs) == LAYERS * 3
    for one, other in pairs:
        first, second = tensors[one].float(), tensors[other].float()
        assert 1e-3 < float((first - second).norm() / first.norm()) < 0.5, one


def test_the_router_leads_the_prompts_of_a_mood_to_its_expert(model: Any, tokenizer: Any) -> None:
    import torch

    def share(prompt: str) -> float:
        """The weight of the first expert at the last token, averaged over the layers."""
        tokens = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens, output_router_logits=True).router_logits
        return float(torch.stack([layer[-1].float().softmax(-1)[0] for layer in logits]).mean())

    happy, zen = ([share(prompt) for prompt in side] for side in PROMPTS)
    assert min(happy) > max(zen)


def test_which_expert_is_taken_changes_what_is_said(model: Any, tokenizer: Any) -> None:
    import torch

    tokens = tokenizer(PROMPTS[0][0], return_tensors="pt")
    said = []
    for sign in (1, -1):  # the other way round, the router prefers the other expert
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.mul_(sign)
            said.append(model(**tokens).logits[0, -1].float().softmax(-1))
            for layer in model.model.layers:
                layer.mlp.gate.weight.mul_(sign)
    assert float((said[0] - said[1]).abs().sum()) > 1e-2
