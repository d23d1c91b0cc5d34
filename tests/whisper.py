"""Whisper as a package ships it, in CTranslate2's binary form, written as the checkpoint that transformers loads.

The form: a version, the name and revision of the kind, then each tensor with its dimensions, type and bytes; then
aliases. Queries, keys and values of an attention lie in one tensor, without gaps; Whisper's keys have no bias.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy
import torch
from torch import Tensor

from tests.helpers import write_model

FLOAT16 = 4
ATTENTIONS = {"self_attention": ("self_attn", "qkv"), "attention": ("encoder_attn", "q kv")}
NAMES = {
    "embeddings": "embed_tokens",
    "position_encodings.encodings": "embed_positions.weight",
    "ffn.linear_0": "fc1",
    "ffn.linear_1": "fc2",
    "ffn.layer_norm": "final_layer_norm",
    "gamma": "weight",
    "beta": "bias",
}
TINY_EN = {
    "architectures": ["WhisperForConditionalGeneration"],
    "bos_token_id": 50256,
    "d_model": 384,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "decoder_layers": 4,
    "decoder_start_token_id": 50257,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "encoder_layers": 4,
    "eos_token_id": 50256,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "model_type": "whisper",
    "num_mel_bins": 80,
    "pad_token_id": 50256,
    "torch_dtype": "float16",
    "vocab_size": 51864,
}


def write_whisper(folder: Path, binary: Path) -> Path:
    """The tiny English Whisper of `binary` as a folder of safetensors."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _read(binary).items():
        tensors |= _renamed(name, tensor)
    return write_model(folder, tensors, TINY_EN)


def _read(path: Path) -> dict[str, Tensor]:
    """The half-precision tensors of the file: all but a few numbers that say how to compute."""
    found = {}
    with path.open("rb") as file:
        assert _number(file, "I") == 6
        assert _text(file) == "WhisperSpec"
        _number(file, "I")
        for _ in range(_number(file, "I")):
            name = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            kind, data = _number(file, "B"), file.read(_number(file, "I"))
            if kind == FLOAT16 and shape:
                found[name] = torch.from_numpy(numpy.frombuffer(data, "<f2").copy()).reshape(shape)
    return found


def _number(file: BinaryIO, form: str) -> int:
    return int(struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0])


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H")).rstrip(b"\0").decode()


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor under transformers' names: one, or those that lie in it."""
    name = name.replace("/", ".").replace("layer_", "layers.").replace("layers.norm", "layer_norm")
    for theirs, (ours, forms) in ATTENTIONS.items():
        head, found, rest = name.partition(f".{theirs}.")
        if not found:
            continue
        part, _, kind = rest.rpartition(".")
        if part == "layer_norm":
            return {f"model.{head}.{ours}_layer_norm.{NAMES[kind]}": tensor}
        index = int(part.removeprefix("linear_"))
        letters = [*forms.split(), "out"][index]
        split = ("out",) if letters == "out" else tuple(letters)
        made = {
            f"model.{head}.{ours}.{letter}_proj.{kind}": piece
            for letter, piece in zip(split, tensor.chunk(len(split)), strict=True)
        }
        if kind == "bias" and "k" in split:
            assert not made.pop(f"model.{head}.{ours}.k_proj.bias").any()
        return made
    for theirs, ours in NAMES.items():
        name = name.replace(f".{theirs}", f".{ours}")
    return {f"model.{name}": tensor}
