"""The architectures of GGUF files that we know, as transformers has them: tensors by name and sides, and config.

Which tensor of a GGUF file a Hugging Face name stands for is looked up in gguf's own tables, never written down here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kittybuild.checkpoint.gguf_header import OTHER_FILES, Header, some
from kittybuild.errors import nearest

ROPE_FREQS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
IN_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_.]+)")

_OUTER = MappingProxyType({"model.embed_tokens": "VH", "model.norm": "H", "lm_head": "VH"})
_ATTENTION = MappingProxyType(
    {
        "input_layernorm": "H",
        "self_attn.q_proj": "QH",
        "self_attn.k_proj": "KH",
        "self_attn.v_proj": "KH",
        "self_attn.o_proj": "HQ",
        "post_attention_layernorm": "H",
    }
)
_HEAD_NORMS = MappingProxyType({"self_attn.q_norm": "D", "self_attn.k_norm": "D"})
_MLP = MappingProxyType({"mlp.gate_proj": "FH", "mlp.up_proj": "FH", "mlp.down_proj": "HF"})
_SANDWICH = MappingProxyType({"pre_feedforward_layernorm": "H", "post_feedforward_layernorm": "H"})
_FUSED = MappingProxyType(
    {
        "input_layernorm": "H",
        "self_attn.qkv_proj": "PH",
        "self_attn.o_proj": "HQ",
        "post_attention_layernorm": "H",
        "mlp.gate_up_proj": "GH",
        "mlp.down_proj": "HF",
    }
)
_EXPERTS = MappingProxyType(
    {
        "mlp.gate": "NH",
        "mlp.experts.gate_proj": "NEH",
        "mlp.experts.up_proj": "NEH",
        "mlp.experts.down_proj": "NHE",
    }
)
_SHARED_EXPERT = MappingProxyType(
    {
        "mlp.shared_expert.gate_proj": "SH",
        "mlp.shared_expert.up_proj": "SH",
        "mlp.shared_expert.down_proj": "HS",
        "mlp.shared_expert_gate": "1H",
    }
)
_MIXTRAL_EXPERTS = MappingProxyType(
    {
        "block_sparse_moe.gate": "NH",
        "block_sparse_moe.experts.w1": "NFH",
        "block_sparse_moe.experts.w2": "NHF",
        "block_sparse_moe.experts.w3": "NFH",
    }
)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION_BIAS = ("attention_bias", (*_QKV, "self_attn.o_proj"))
_TANH = MappingProxyType({"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"})


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture. `layer`: the tensors of each layer by their names in it, with a letter for each side.

    V vocabulary, H hidden, F feed-forward, Q, K and P all query, all key, and all of both and value heads, D one head,
    G gate and up, N experts (one entry each), E and S the feed-forward of one and of the shared expert.
    `biased`: those with a bias; `flags`: those that have one if a flag of the config is set. `interleaved`: rows of
    query and key heads are stored in another order. `shift`: so much was added to the weights of norms.
    `words`: of the config with their defaults (None: there is none), by the metadata; `constants`: without metadata.
    `beside`: tensors that are no weights, for the config.
    """

    model_type: str
    model_class: str
    layer: Mapping[str, str]
    biased: tuple[str, ...] = ()
    flags: tuple[tuple[str, tuple[str, ...]], ...] = ()
    interleaved: bool = False
    shift: int = 0
    words: Mapping[str, tuple[str, float | int | None]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()


_USED_EXPERTS = MappingProxyType({"expert_used_count": ("num_experts_per_tok", None)})
_MOE = MappingProxyType({"expert_count": ("num_experts", None), **_USED_EXPERTS})
_FAMILIES = MappingProxyType(
    {
        "llama": Family(
            "llama",
            "LlamaForCausalLM",
            _ATTENTION | _MLP,
            flags=(_ATTENTION_BIAS, ("mlp_bias", tuple(_MLP))),
            interleaved=True,
            beside=frozenset((ROPE_FREQS,)),
        ),
        "mixtral": Family(
            "mixtral",
            "MixtralForCausalLM",
            _ATTENTION | _MIXTRAL_EXPERTS,
            interleaved=True,
            beside=frozenset((ROPE_FREQS,)),
            words={"expert_count": ("num_local_experts", None), **_USED_EXPERTS},
        ),
        "qwen2": Family("qwen2", "Qwen2ForCausalLM", _ATTENTION | _MLP, biased=_QKV),
        "qwen3": Family("qwen3", "Qwen3ForCausalLM", _ATTENTION | _HEAD_NORMS | _MLP, flags=(_ATTENTION_BIAS,)),
        "qwen2moe": Family(
            "qwen2_moe", "Qwen2MoeForCausalLM", _ATTENTION | _EXPERTS | _SHARED_EXPERT, biased=_QKV, words=_MOE
        ),
        "qwen3moe": Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _ATTENTION | _HEAD_NORMS | _EXPERTS,
            flags=(_ATTENTION_BIAS,),
            words=_MOE,
            constants={"norm_topk_prob": True},
        ),
        "gemma": Family("gemma", "GemmaForCausalLM", _ATTENTION | _MLP, shift=1, constants=_TANH),
        "gemma2": Family(
            "gemma2",
            "Gemma2ForCausalLM",
            _ATTENTION | _SANDWICH | _MLP,
            shift=1,
            words={
                "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
                "final_logit_softcapping": ("final_logit_softcapping", 30.0),
                "attention.sliding_window": ("sliding_window", 4096),
            },
            constants=_TANH,
        ),
        "gemma3": Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _ATTENTION | _HEAD_NORMS | _SANDWICH | _MLP,
            shift=1,
            words={
                "attention.sliding_window": ("sliding_window", None),
                "rope.freq_base_swa": ("rope_local_base_freq", 10000.0),
            },
            constants={**_TANH, "sliding_window_pattern": 6},
        ),
        "phi3": Family(
            "phi3",
            "Phi3ForCausalLM",
            _FUSED,
            words={"rope.scaling.original_context_length": ("original_max_position_embeddings", None)},
            beside=frozenset((LONG_FACTORS, SHORT_FACTORS)),
        ),
    }
)


def family_of(header: Header) -> Family:
    """The family of a file. Raises SourceError KB215."""
    architecture = header.get("general.architecture", str)
    if architecture == "llama" and header.get("llama.expert_count", int, 0):
        return _FAMILIES["mixtral"]
    if architecture not in _FAMILIES or architecture == "mixtral":
        hint = f"{nearest(str(architecture), (name for name in _FAMILIES if name != 'mixtral'))}; or {OTHER_FILES}"
        raise header.error("KB215", f"the architecture {architecture!r} is unknown", hint)
    return _FAMILIES[architecture]


@dataclass(frozen=True, slots=True)
class Names:
    """What tensors are called: Hugging Face names and sides by GGUF stems, those of the model and those of a layer."""

    outer: Mapping[str, tuple[str, str]]
    layer: Mapping[str, tuple[str, str]]
    always: frozenset[str]
    flags: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, family: Family, architecture: str) -> Names:
        """The names of a family, by gguf's tables."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
        table = get_tensor_name_map(number, 1)
        outer = {table.get_name(own): (own, sides) for own, sides in _OUTER.items()}
        stems = {own: table[f"model.layers.0.{own}"].removeprefix("blk.0.") for own in family.layer}
        flags = {flag: frozenset(f"{stems[own]}.bias" for own in biased) for flag, biased in family.flags}
        always = {f"{stem}.weight" for stem in stems.values()} | {f"{stems[own]}.bias" for own in family.biased}
        layer = {stems[own]: (own, sides) for own, sides in family.layer.items()}
        return cls({stem: found for stem, found in outer.items() if stem}, layer, frozenset(always), flags)

    def check(self, header: Header, family: Family, layers: int) -> dict[str, bool]:
        """The flags of the config that the tensors set. Raises SourceError KB216 for tensors unknown or missing."""
        optional = frozenset[str]().union(*self.flags.values())
        outer = {f"{stem}.weight" for stem in self.outer}
        found: dict[int, set[str]] = {number: set() for number in range(min(layers, len(header.tensors)))}
        unknown = []
        for name in header.tensors:
            match = IN_LAYER.fullmatch(name)
            if match and int(match[1]) in found and match[2] in self.always | optional:
                found[int(match[1])].add(match[2])
            elif name not in outer | family.beside:
                unknown.append(name)
        if unknown:
            raise header.error("KB216", f"{family.model_class} has no tensors for {some(unknown)}", OTHER_FILES)
        every = set[str]().union(*found.values())
        flags = {flag: bool(members & every) for flag, members in self.flags.items()}
        always = self.always.union(*(members for flag, members in self.flags.items() if flags[flag]))
        missing = [f"blk.{number}.{suffix}" for number, there in found.items() for suffix in sorted(always - there)]
        missing += sorted(outer - {"output.weight"} - set(header.tensors))
        if missing:
            raise header.error("KB216", f"tensors are missing: {some(missing)}")
        return flags


def sizes_of(header: Header, family: Family) -> dict[str, int]:
    """The sides by their letters, and the numbers of heads. Raises SourceError KB218."""
    architecture = header.get("general.architecture", str)
    hidden = header.size(f"{architecture}.embedding_length")
    heads = header.size(f"{architecture}.attention.head_count")
    groups = header.size(f"{architecture}.attention.head_count_kv", heads)
    head = header.size(f"{architecture}.attention.key_length", max(1, hidden // heads))
    if head % 2 or heads % groups:
        what = f"{heads} heads of {head} rows over {groups} key heads are no attention"
        raise header.error("KB218", what, OTHER_FILES)
    sizes = {"V": header.tensors["token_embd.weight"].shape[0], "H": hidden, "D": head, "heads": heads, "1": 1}
    sizes |= {"F": header.size(f"{architecture}.feed_forward_length"), "Q": heads * head, "K": groups * head}
    sizes |= {"G": 2 * sizes["F"], "P": sizes["Q"] + 2 * sizes["K"], "groups": groups}
    letters = set("".join(family.layer.values()))
    if "N" in letters:
        sizes["N"] = header.size(f"{architecture}.expert_count")
    for letter, key, tensor, side in (
        ("E", "expert_feed_forward_length", "blk.0.ffn_gate_exps.weight", 1),
        ("S", "expert_shared_feed_forward_length", "blk.0.ffn_gate_shexp.weight", 0),
    ):
        if letter in letters:
            sizes[letter] = header.size(f"{architecture}.{key}", (0, *header.tensors[tensor].shape)[side + 1 :][0])
    return sizes
