"""What PEFT calls the parts of an adapter, and the adapter_config.json that goes with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from kittybuild.planner.names import natural

PREFIX = "base_model.model."
Kind = Literal["linear", "embedding", "conv"]


def factor_names(module: str, kind: Kind) -> tuple[str, str]:
    """The names of A and B of a module."""
    if kind == "embedding":
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def adapter_config(
    ranks: Mapping[str, int],
    *,
    base: str,
    others: Collection[str] | None,
    saved: Sequence[str] = (),
    biases: bool = False,
    transposed: bool = False,
    tied: bool = False,
) -> dict[str, Any]:
    """adapter_config.json for modules of these ranks, each of scale 1.

    `others`: all modules of the base, among which the targets must be told apart (None: they are unknown); `biases`:
    those of the modules are held whole; `tied`: the head shares the embeddings and follows them.
    """
    rank = max(ranks.values(), default=0)
    different = {name: ranks[name] for name in sorted(ranks, key=natural) if ranks[name] != rank}
    config: dict[str, Any] = {
        "alpha_pattern": different,
        "base_model_name_or_path": base,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved, key=natural) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": different,
        "target_modules": _targets(ranks, others),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return {**config, "ensure_weight_tying": True} if tied else config


def _targets(modules: Collection[str], others: Collection[str] | None) -> list[str]:
    """The last parts of the modules' names, where these stand for no other module; else the whole names."""
    if others is None:
        return sorted(modules, key=natural)
    last = {name.rpartition(".")[2] for name in modules}
    strangers = {name.rpartition(".")[2] for name in others if name not in modules}
    kept = {name for name in modules if name.rpartition(".")[2] in strangers}
    return sorted({*(last - strangers), *kept}, key=natural)
