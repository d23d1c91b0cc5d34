"""Pico Llamas with small tokenizers of their own to be transplanted, for tests and the comparison with mergekit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kittybuild.tokens.reading import read_vocabulary
from kittybuild.tokens.vocabulary import Vocabulary
from tests.helpers import llama_config, llama_shapes, noise, write_json, write_model
from tests.tokenizers import Files, byte_fallback, byte_level, files_of, write_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WIDTH = 32
SPECIAL = ("<unk>", "<s>", "</s>")


def tokenizers() -> dict[str, Files]:
    """Two byte-level vocabularies, and one with byte fallback."""
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    one = byte_level(["Ġthe", "ing", "Ġcat", "Ġto", "is", "Ġon"], ["</s>", "<pad>", "<a>"])
    two = byte_level(["Ġthe", "Ġthey", "ings", "Ġcatch", "Ġtop", "this", "Ġon", "Ġonly"], ["<end>", "<b>"])
    three = byte_fallback(["▁the", "▁they", "cat", "ing", "ints", "▁on", "▁to", "▁tea", "one"], [*SPECIAL, "<mask>"])
    return {
        "one": files_of(one, {"eos_token": "</s>", "pad_token": "<pad>"}),
        "two": files_of(two, {"eos_token": "<end>"}),
        "three": files_of(three, roles),
    }


def vocabulary(files: Mapping[str, bytes], rows: int | None = None) -> Vocabulary:
    """The vocabulary of tokenizer files; a row for each token, or so many."""
    found = read_vocabulary(files, 0, "test")
    assert found is not None
    made = read_vocabulary(files, found.end if rows is None else rows, "test")
    assert made is not None
    return made


def write(
    folder: Path, name: str, files: Files, *, fillers: int = 0, tie: bool = False, dtype: str = "float32", **config: Any
) -> Vocabulary:
    """A model of that name with this tokenizer, in the folder; returns its vocabulary."""
    rows = vocabulary(files).end + fillers
    known = vocabulary(files, rows)
    shapes = llama_shapes(layers=1, width=WIDTH, vocab=rows, tie=tie)
    tensors = {tensor: noise(len(name), f"{name} {tensor}", shape) for tensor, shape in shapes.items()}
    tensors = {tensor: values.to(getattr(torch, dtype)) for tensor, values in tensors.items()}
    ids = {f"{role}_id": known.ids[token] for role, token in known.roles.items() if role != "unk_token"}
    plain = llama_config(layers=1, width=WIDTH, vocab=rows, tie=tie, dtype=dtype)
    write_model(folder / name, tensors, {**plain, "bos_token_id": None, **ids, **config})
    write_json(folder / name / "generation_config.json", {"bos_token_id": None, **ids})
    write_files(folder / name, files)
    return known
