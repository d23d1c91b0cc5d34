"""Llama-shaped siblings of a chosen size, made from seeds: a base and fine-tunes that differ from it by small noise."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int


LLAMA_1B = Shape(layers=22, width=2048, inner=5632, heads=32, kv_heads=4, vocab=32_000)
LLAMA_54M = Shape(layers=8, width=512, inner=2048, heads=8, kv_heads=8, vocab=20_000)


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The tensors of such a model by their Hugging Face names."""
    kv = shape.width // shape.heads * shape.kv_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.width)}
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}."
        found[stem + "self_attn.q_proj.weight"] = (shape.width, shape.width)
        found[stem + "self_attn.k_proj.weight"] = (kv, shape.width)
        found[stem + "self_attn.v_proj.weight"] = (kv, shape.width)
        found[stem + "self_attn.o_proj.weight"] = (shape.width, shape.width)
        found[stem + "mlp.gate_proj.weight"] = (shape.inner, shape.width)
        found[stem + "mlp.up_proj.weight"] = (shape.inner, shape.width)
        found[stem + "mlp.down_proj.weight"] = (shape.width, shape.inner)
        found[stem + "input_layernorm.weight"] = (shape.width,)
        found[stem + "post_attention_layernorm.weight"] = (shape.width,)
    return {**found, "model.norm.weight": (shape.width,), "lm_head.weight": (shape.vocab, shape.width)}


def config(shape: Shape, dtype: str = "bfloat16", positions: int = 2048) -> dict[str, Any]:
    """The config.json of such a model, with room for so many positions."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def make_siblings(folder: str, shape: Shape, count: int, dtype: str = "bfloat16") -> list[str]:
    """`count` model folders m0, m1, ... in `folder`; what is there already is kept. The first is the base."""
    paths = [os.path.join(folder, f"m{number}") for number in range(count)]
    for number, path in enumerate(paths):
        if not os.path.exists(os.path.join(path, "config.json")):
            _make(path, shape, number, dtype)
    return paths


def _make(path: str, shape: Shape, number: int, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    os.makedirs(path, exist_ok=True)
    tensors = {}
    for index, (name, sides) in enumerate(tensor_shapes(shape).items()):
        base = torch.randn(sides, generator=torch.Generator().manual_seed(index)) * 0.02
        if number:
            base += torch.randn(sides, generator=torch.Generator().manual_seed(1_000_003 * number + index)) * 0.002
        tensors[name] = base.to(getattr(torch, dtype))
    save_file(tensors, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config(shape, dtype), file, indent=2)
