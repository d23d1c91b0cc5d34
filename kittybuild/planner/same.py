"""What names cannot tell: which names stand for one weight, and which tensors are computed rather than learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kittybuild.model.derivation import Input
from kittybuild.tensors import TensorSpec

_EMBEDDING = re.compile(
    r"(^|.*\.)(embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|shared|tokens_embed)\.weight"
)
_HEAD = re.compile(
    r"(^|.*\.)(lm_head|embed_out|proj_out|output|predictions\.decoder|lm_head\.decoder|vocab_projector)\.weight"
)
_HEAD_BIASES = ((".decoder.bias", ".bias"), (".bias", ".decoder.bias"))
_COMPUTED = re.compile(r"(^|.*\.)(inv_freq|position_ids|attn\.masked_bias)")
_MASK = re.compile(r"(^|.*\.)(attn|attention)\.bias")


def is_computed(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is a buffer that every loader makes anew: frequencies, position ids, masks of a causal model."""
    return bool(_COMPUTED.fullmatch(name)) or (bool(_MASK.fullmatch(name)) and len(spec.shape) == 4)


def is_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether a model may use its embedding as its head: its config does not deny it."""
    return all(_tied_words(config or {}))


def says_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether a model's config says that its embedding is its head."""
    return any(_tied_words(config or {})) and is_tied(config)


def _tied_words(config: Mapping[str, Any]) -> Iterator[bool]:
    for key, value in config.items():
        if key == "tie_word_embeddings":
            yield value is not False
        elif isinstance(value, Mapping) and key in ("text_config", "decoder", "llm_config"):
            yield from _tied_words(value)


def same_weight(name: str, spec: TensorSpec, tensors: Mapping[str, Input]) -> str | None:
    """The name under which `tensors` have the weight `name`, if a model may keep the two as one: head and embedding,
    the embeddings of encoder and decoder, the two names of a head's bias."""
    if _HEAD.fullmatch(name) or _EMBEDDING.fullmatch(name):
        found = [
            other for other, given in tensors.items() if _EMBEDDING.fullmatch(other) and given.spec.shape == spec.shape
        ]
        return next((other for other in found if "decoder" in other), found[0] if found else None)
    for ending, other in _HEAD_BIASES:
        renamed = name.removesuffix(ending) + other
        if name.endswith(ending) and "predictions" in name and renamed in tensors:
            return renamed
    return None
