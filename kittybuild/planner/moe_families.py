"""The families of mixtures of experts, as values: what they are made of, their tensors' names, their config.json.

Names are those of released models of the family, below `model.layers.N.`; configs have the field names of
transformers' classes, and say all that the base's class and the family's assume differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Config = Mapping[str, Any]

MATRICES = ("gate", "up", "down")
"""What we call the matrices of an MLP: down(act(gate(x)) * up(x))."""


@dataclass(frozen=True)
class Sizes:
    """What a config has to tell: numbers of experts, and the rows of their matrices."""

    experts: int
    shared: int
    per_token: int
    inner: int


@dataclass(frozen=True)
class Family:
    """One family. `inputs`: the model types of its base and experts, which are dense. `alias`: mergekit-moe's name.

    `experts`, `shared`: the module of an expert (with its number for {}) and of the shared one; `words`: what their
    matrices are called. `shared_gate`: the tensor that weighs the shared expert, if one does. `least`, `most`: how
    many shared experts there are. `biased`: modules whose biases are zeros where the base has none. `windows`:
    whether its attention can have sliding windows as the base's. `fused`: whether there is a stacked layout.
    `config`: what its config.json has beside the base's keys.
    """

    name: str
    model_type: str
    architecture: str
    inputs: frozenset[str]
    config: Callable[[Sizes, Config], dict[str, Any]]
    experts: str = "mlp.experts.{}"
    router: str = "mlp.gate.weight"
    words: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    shared_gate: str = ""
    least: int = 0
    most: int = 0
    biased: tuple[str, ...] = ()
    windows: bool = True
    fused: bool = True
    alias: str = ""

    def refusals(self, model_types: Mapping[str, str], config: Config, shared: int) -> list[str]:
        """Why these models (names to types) on a base of this config do not fit; nothing where they do."""
        found = []
        others = [f"{name} is {kind}" for name, kind in model_types.items() if kind not in self.inputs]
        if others:
            found.append(f"it is made of {' or '.join(sorted(self.inputs))}: {', '.join(others)}")
        if not self.least <= shared <= self.most:
            wanted = "no" if not self.most else "one" if self.least else "at most one"
            found.append(f"it has {wanted} shared expert, not {shared}")
        if not self.windows and sliding_window(config) is not None:
            found.append("it has no sliding window of attention, which the base has")
        return found


def sliding_window(config: Config) -> int | None:
    """The window of a base's attention, where it has one."""
    window: int | None = assumed(config).get("sliding_window")
    return window if config.get("use_sliding_window", config.get("model_type") == "mistral") else None


def assumed(config: Config) -> dict[str, Any]:
    """A base's config with what its class assumes where it says nothing."""
    defaults = dict(_ASSUMED.get(str(config.get("model_type")), {}))
    if "rope_parameters" in config:
        defaults.pop("rope_theta", None)
    defaults.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    return {**defaults, **config}


def family_config(family: Family, base: Config, sizes: Sizes) -> dict[str, Any]:
    """The config.json of the output: the base's, under the family's name, with the family's own keys."""
    kept = {key: value for key, value in assumed(base).items() if key not in _DROPPED}
    named = {"architectures": [family.architecture], "model_type": family.model_type}
    return {**kept, **named, "num_experts_per_tok": sizes.per_token, **family.config(sizes, base)}


_DROPPED = frozenset({"auto_map", "mlp_bias", "pretraining_tp", "_name_or_path"})
_TOKENS: Config = MappingProxyType({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
_LLAMA: Config = MappingProxyType(
    {
        **_TOKENS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
)
_QWEN: Config = MappingProxyType({**_LLAMA, **_TOKENS, "max_position_embeddings": 32768, "num_key_value_heads": 32})
_OLMO: Config = MappingProxyType(
    {**_LLAMA, **_TOKENS, "pad_token_id": 1, "eos_token_id": 50279, "rms_norm_eps": 1e-05, "vocab_size": 50304}
)
_ASSUMED: Mapping[str, Config] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": {
            **_LLAMA,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        "qwen2": {**_QWEN, "vocab_size": 151936, "sliding_window": 4096},
        "qwen3": {**_QWEN, "vocab_size": 151936, "sliding_window": 4096, "head_dim": 128},
        "olmo2": _OLMO,
        "olmoe": {**_OLMO, "max_position_embeddings": 4096},
    }
)
"""What transformers' classes assume where a config.json is silent."""


def _mixtral(sizes: Sizes, base: Config) -> dict[str, Any]:
    return {"num_local_experts": sizes.experts, "sliding_window": sliding_window(base), "output_router_logits": False}


def _qwen(sizes: Sizes, base: Config) -> dict[str, Any]:
    return {
        **_windows(base),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.inner,
        "norm_topk_prob": True,
        "num_experts": sizes.experts,
        "output_router_logits": False,
        **({"shared_expert_intermediate_size": sizes.inner} if sizes.shared else {}),
    }


def _windows(base: Config) -> dict[str, Any]:
    """Which layers have a window, layer by layer: the classes of Qwen have rules of their own."""
    if sliding_window(base) is None:
        return {}
    first = 0 if base["model_type"] == "mistral" else base.get("max_window_layers", 28)
    kinds = ["sliding_attention" if n >= first else "full_attention" for n in range(base["num_hidden_layers"])]
    return {"use_sliding_window": True, "layer_types": base.get("layer_types") or kinds}


def _deepseek(sizes: Sizes, base: Config) -> dict[str, Any]:
    code = "deepseek-ai/deepseek-moe-16b-base--"
    rope = base.get("rope_parameters") or {}  # its own code knows the older keys
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    older = {"rope_theta": rope.get("rope_theta"), "rope_scaling": scaling}
    if rope.get("rope_type", "default") == "default":
        older["rope_scaling"] = None
    return {
        **(older if rope else {}),
        "auto_map": {
            "AutoConfig": f"{code}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{code}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{code}modeling_deepseek.DeepseekForCausalLM",
        },
        "first_k_dense_replace": 0,
        "moe_intermediate_size": sizes.inner,
        "moe_layer_freq": 1,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": sizes.shared or None,
        "norm_topk_prob": True,
        "scoring_func": "softmax",
    }


def _olmoe(sizes: Sizes, base: Config) -> dict[str, Any]:
    return {"norm_topk_prob": True, "num_experts": sizes.experts, "output_router_logits": False}


FAMILIES = (
    Family(
        "Mixtral",
        "mixtral",
        "MixtralForCausalLM",
        frozenset({"llama", "mistral"}),
        _mixtral,
        experts="block_sparse_moe.experts.{}",
        router="block_sparse_moe.gate.weight",
        words=("w1", "w3", "w2"),
    ),
    Family(
        "DeepSeek-MoE",
        "deepseek",
        "DeepseekForCausalLM",
        frozenset({"llama", "mistral"}),
        _deepseek,
        shared="mlp.shared_experts",
        most=1,
        windows=False,
        fused=False,
    ),
    Family(
        "Qwen2-MoE",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        frozenset({"llama", "mistral", "qwen2"}),
        _qwen,
        shared="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate.weight",
        least=1,
        most=1,
        biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        alias="Qwen MoE",
    ),
    Family("Qwen3-MoE", "qwen3_moe", "Qwen3MoeForCausalLM", frozenset({"qwen3"}), _qwen, windows=False),
    Family("OLMoE", "olmoe", "OlmoeForCausalLM", frozenset({"olmoe"}), _olmoe),
    Family("FlexOlmo", "flex_olmo", "FlexOlmoForCausalLM", frozenset({"olmo2"}), _olmoe),
)
"""In the order of preference where several fit."""


def named(word: str) -> tuple[Family, ...]:
    """The families that `word` may mean: the beginning of a name, however it is spelled."""
    plain = _plain(word)
    return tuple(
        family
        for family in FAMILIES
        if any(_plain(name).startswith(plain) for name in (family.name, family.alias, family.model_type))
    )


def _plain(word: str) -> str:
    return "".join(letter for letter in word.lower() if letter.isalnum())
