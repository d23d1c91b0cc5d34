"""rxnfp 0.1.0: a real base with two real fine-tunes, written as siblings of one architecture that the peers know.

They come with different heads, names and forms of the file; only what all share is taken, and the base's head.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import write_model, write_tokenizer

MODELS = {"base": "bert_pretrained", "ft": "bert_ft", "classifier": "bert_ft_10k_25s"}


def write_real(folder: Path) -> None:
    """`base-float32`, `ft-float32` and `classifier-float32`."""
    package = importlib.metadata.distribution("rxnfp")
    found = {
        name: _body(Path(str(package.locate_file(f"rxnfp/models/transformers/{path}"))))
        for name, path in MODELS.items()
    }
    head = {name: tensor for name, tensor in found["base"].items() if name.startswith("cls.predictions.")}
    shared = set.intersection(*(set(tensors) for tensors in found.values()))
    config = {
        "architectures": ["BertForMaskedLM"],
        "hidden_act": "gelu",
        "hidden_size": 256,
        "intermediate_size": 512,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 4,
        "num_hidden_layers": 12,
        "torch_dtype": "float32",
        "type_vocab_size": 2,
        "vocab_size": 591,
    }
    for name, tensors in found.items():
        body = {key: tensor for key, tensor in tensors.items() if key in shared}
        write_model(folder / f"{name}-float32", {**body, **head}, config)
        write_tokenizer(folder / f"{name}-float32", 591)


def _body(folder: Path) -> dict[str, Tensor]:
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    return {
        name if name.startswith(("bert.", "cls.")) else f"bert.{name}": tensor.clone()
        for name, tensor in tensors.items()
    }
