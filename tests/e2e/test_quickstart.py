"""The quickstart on real weights: what `make demo` shows, asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.building import build

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The folder of the merge, the store, and what the first build said."""
    folder = tmp_path_factory.mktemp("quickstart")
    report = build(QUICKSTART / "calm-smol.yml", "-o", folder / "calm", "--store", folder / "store")
    return {"folder": folder, "report": report}


def test_it_computes_what_the_adapters_change_and_then_the_merge(made: dict[str, object]) -> None:
    stages = made["report"]["stages"]  # type: ignore[index]
    assert {name: stage["computed"] for name, stage in stages.items()} == {"glad": 120, "still": 120, "calm": 272}
    assert all(stage["nonfinite"] == {} for stage in stages.values())


def test_the_merge_loads_whole_and_answers_in_sentences(made: dict[str, object]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(str(made["folder"])) / "calm"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer.startswith("The capital of France is Paris")


def test_another_weight_in_three_layers_makes_27_tensors_and_the_same_bits_as_a_cold_build(
    made: dict[str, object], tmp_path: Path
) -> None:
    folder = Path(str(made["folder"]))
    changed = QUICKSTART / "calm-smol-brighter.yml"
    warm = build(changed, "-o", folder / "calm", "--store", folder / "store")
    assert {name: stage["computed"] for name, stage in warm["stages"].items()} == {"glad": 0, "still": 0, "calm": 27}
    assert warm["outputs"]["calm"]["shards_linked"] > 0
    cold = build(changed, "-o", tmp_path / "calm", "--store", tmp_path / "store", "--jobs", "1", "--memory", "256MB")
    assert warm["stages"]["calm"]["manifest"] == cold["stages"]["calm"]["manifest"]
