"""Pico models of any architecture for tests of mixtures, and recipes of mixtures.

`mixture(base, experts, gate_mode="cheap_embed")` is the plain data of a mergekit-moe configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers import noise, write_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MORE = {
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 3},
    "olmoe": {"num_experts": 1, "num_experts_per_tok": 1},
}
PROMPTS = (["w1 w2 w3", "w4 w5 w6 w9 w10"], ["w20 w22", "w24 w25 w26"], ["w30 w31"])


def pico(folder: str | Path, model_type: str, seed: int, *, tie: bool = False, **config: Any) -> Path:
    """A folder as transformers saves a model of that type; float32, weights that only seed and names decide."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    folder = Path(folder)
    sizes = {**SIZES, **MORE.get(model_type, {}), "tie_word_embeddings": tie, **config}
    made = CONFIG_MAPPING[model_type](**sizes)
    made.pad_token_id = None
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = noise(seed, name, tuple(weight.shape))
            weight.copy_(1 + 0.1 * drawn if weight.dim() == 1 else drawn / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder, sizes["vocab_size"])
    return folder


def mixture(base: str | Path, experts: Sequence[str | Path], **more: Any) -> dict[str, Any]:
    """A mergekit-moe configuration: each expert with prompts of its own."""
    listed = [
        {"source_model": str(expert), "positive_prompts": prompts}
        for expert, prompts in zip(experts, PROMPTS, strict=False)
    ]
    return {"base_model": str(base), "gate_mode": "cheap_embed", "experts": listed, **more}


def loaded(folder: str | Path) -> Any:
    """The model in a folder, in float32, which transformers loads without a tensor missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(folder: str | Path) -> Any:
    """What a model says to a fixed text."""
    import torch

    with torch.no_grad():
        return loaded(folder)(input_ids=torch.tensor([[1, 5, 9, 33, 7, 8, 40]])).logits
