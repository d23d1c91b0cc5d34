"""The config.json that a GGUF file's metadata and tensors stand for, and notes on what it has no words for."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kittybuild.checkpoint import gguf_tokenizer
from kittybuild.checkpoint.gguf_families import LONG_FACTORS, ROPE_FREQS, SHORT_FACTORS, Family
from kittybuild.checkpoint.gguf_header import OTHER_FILES, Header
from kittybuild.tensors import DType

_THETA = MappingProxyType({"gemma3": 1000000.0})  # what llama.cpp assumes; of all others
_ROPE_THETA = 10000.0
_LARGEST_GEMMA = MappingProxyType({"gemma2": 46, "gemma3": 62})  # layers of those that scale queries by all heads
_USED = (
    "vocab_size block_count context_length embedding_length feed_forward_length rope.dimension_count rope.freq_base"
    " attention.head_count attention.head_count_kv attention.key_length attention.value_length"
    " attention.layer_norm_rms_epsilon rope.scaling.type rope.scaling.finetuned"
)


def config_of(
    header: Header, family: Family, sizes: Mapping[str, int], dtype: DType, flags: Mapping[str, bool]
) -> tuple[dict[str, Any], list[str]]:
    """The config, and notes. Raises SourceError KB218 for metadata that is missing or makes no sense."""
    architecture = header.get("general.architecture", str)
    roles = gguf_tokenizer.token_ids(header)
    config = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "vocab_size": sizes["V"],
        "hidden_size": sizes["H"],
        "intermediate_size": sizes["F"],
        "num_hidden_layers": header.size(f"{architecture}.block_count"),
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["groups"],
        "head_dim": sizes["D"],
        "hidden_act": "silu",
        "max_position_embeddings": header.size(f"{architecture}.context_length"),
        "rms_norm_eps": header.real(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": header.real(f"{architecture}.rope.freq_base", _THETA.get(architecture, _ROPE_THETA)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{f"{role}_token_id": roles.get(role) for role in ("bos", "eos", "pad")},
        "dtype": dtype.torch_name,
    }
    used = set(_USED.split())
    own = _own_words(header, family, sizes, used)
    scaling, notes = _rope_scaling(header, sizes, used)
    for key, value in header.metadata.items():
        prefix, _, rest = key.partition(".")
        if prefix == architecture and rest not in used:
            notes.append(f"{key} is not carried over: {value!r:.60}")
    return config | scaling | dict(flags) | own, notes


def _own_words(header: Header, family: Family, sizes: Mapping[str, int], used: set[str]) -> dict[str, Any]:
    """What only the configs of the family have. Keys of the metadata that it takes go into `used`."""
    architecture = header.get("general.architecture", str)
    found = dict(family.constants)
    for key, (word, default) in family.words.items():
        read = header.real if isinstance(default, float) else header.size
        found[word] = read(f"{architecture}.{key}", default)  # type: ignore[arg-type]
        used.add(key)
    for letter, key, word in (
        ("E", "expert_feed_forward_length", "moe_intermediate_size"),
        ("S", "expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ):
        if letter in sizes:
            found[word] = sizes[letter]
            used.add(key)
    if architecture in _LARGEST_GEMMA:
        layers = header.size(f"{architecture}.block_count")
        largest = layers == _LARGEST_GEMMA[architecture]
        found["query_pre_attn_scalar"] = sizes["H"] // sizes["heads"] if largest else sizes["D"]
    if architecture == "gemma3" and "gemma3.final_logit_softcapping" in header.metadata:
        found["final_logit_softcapping"] = header.real("gemma3.final_logit_softcapping")
        used.add("final_logit_softcapping")
    if architecture == "phi3":
        found["sliding_window"] = header.get("phi3.attention.sliding_window", int) or None
        found["partial_rotary_factor"] = header.size("phi3.rope.dimension_count", sizes["D"]) / sizes["D"]
        used.add("attention.sliding_window")
    return found


def _rope_scaling(header: Header, sizes: Mapping[str, int], used: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The `rope_scaling` of the config, and notes on what it has no word for."""
    architecture, notes = header.get("general.architecture", str), []
    base, scaling = f"{architecture}.rope.scaling", {}
    kind = header.get(f"{base}.type", str, "none")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": header.real(f"{base}.factor")}
        used.add("rope.scaling.factor")
    elif kind != "none":
        used.remove("rope.scaling.type")
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = header.size(f"{base}.original_context_length")
        used.add("rope.scaling.original_context_length")
    if ROPE_FREQS in header.tensors:
        llama3 = _llama3_scaling(header, header.real(f"{architecture}.rope.freq_base", _ROPE_THETA), sizes["D"])
        if scaling or not llama3:
            notes.append(f"{ROPE_FREQS} is not carried over: config.json has no word for its factors")
        scaling = scaling or llama3
    dimensions = header.size(f"{architecture}.rope.dimension_count", sizes["D"])
    if LONG_FACTORS in header.tensors or SHORT_FACTORS in header.tensors:
        factors = {"short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
        scaling = {word: _floats(header, name, dimensions // 2) for word, name in factors.items()}
        scaling = {"type": "longrope", **scaling}
        used |= {"rope.scaling.attn_factor", "rope.scaling.type"}  # which follow from the lengths of the context
    if dimensions != sizes["D"] and architecture != "phi3":
        used.remove("rope.dimension_count")
    return ({"rope_scaling": scaling} if scaling else {}), notes


def _floats(header: Header, name: str, count: int) -> list[float]:
    """A small tensor of `count` float32 values, with the fewest digits that are the same float32."""
    import numpy

    stored = header.tensors.get(name)
    if stored is None or (stored.type, stored.shape) != ("F32", (count,)):
        found = "missing" if stored is None else f"{stored.type}{list(stored.shape)}"
        raise header.error("KB216", f"{name} is {found}, not F32{[count]}")
    try:
        with open(stored.path, "rb") as file:
            file.seek(stored.offset)
            values = struct.unpack(f"<{count}f", file.read(stored.nbytes))
    except (OSError, struct.error) as error:
        raise header.error("KB201", f"cannot be read: {error}") from None
    if not all(map(math.isfinite, values)):
        raise header.error("KB218", f"{name} has values that are not finite", OTHER_FILES)
    return [float(str(numpy.float32(value))) for value in values]


def _llama3_scaling(header: Header, theta: float, head: int) -> dict[str, Any]:
    """The `llama3` rule behind the factors of `rope_freqs.weight`; empty if it gives others."""
    stored, low, high, context = header.tensors[ROPE_FREQS], 1.0, 4.0, 8192
    if (stored.type, stored.shape) != ("F32", (head // 2,)):
        return {}
    factors = _floats(header, ROPE_FREQS, head // 2)
    factor = factors[-1]
    if not 1 <= factor < math.inf:
        return {}
    for number, found in enumerate(factors):
        turns = context / (2 * math.pi * theta ** (2 * number / head))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        if not math.isclose(found, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            return {}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
