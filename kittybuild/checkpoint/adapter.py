"""PEFT LoRA adapter folders: which factors belong to which module, and with what scale.

What we cannot apply exactly is a SourceError that names it, never ignored.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kittybuild.checkpoint.folder import inside, read_json, read_weights
from kittybuild.checkpoint.source import Checkpoint, Entry, FileId
from kittybuild.errors import SourceError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LARGEST_ALPHA = 1e30
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$)[^.]+)?\.weight")
_NOT_YET = MappingProxyType(
    {
        "use_dora": "DoRA",
        "use_qalora": "QALoRA",
        "use_bdlora": "block-diagonal factors",
        "kasa_config": "KaSA",
        "monteclora_config": "MonteCLoRA",
        "arrow_config": "Arrow routing",
        "alora_invocation_tokens": "activated LoRA",
        "modules_to_save": "modules_to_save",
        "layer_replication": "layer_replication",
        "target_parameters": "target_parameters",
        "trainable_token_indices": "trainable tokens",
    }
)


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's factors: A [r, in], B [out, r], and the scale alpha / r (rsLoRA: alpha / sqrt r)."""

    a: Entry
    b: Entry
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter folder says. `transposed`: the base keeps these weights as [in, out] (fan_in_fan_out)."""

    modules: Mapping[str, Factors]
    transposed: bool


def is_adapter(path: str) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return os.path.isfile(os.path.join(path, CONFIG))


def read_adapter_folder(path: str) -> Checkpoint:
    """The adapter's tensors as a checkpoint of kind `adapter`, its config beside them."""
    weights = next((name for name in WEIGHTS if os.path.isfile(os.path.join(path, name))), None)
    if weights is None:
        message = f"the adapter has no {' or '.join(WEIGHTS)}"
        raise SourceError("KB205", message, at=path, hint="save it again with peft")
    entries, notes = read_weights(inside(path, weights))
    config = read_json(inside(path, CONFIG))
    files = tuple(FileId.of(os.path.join(path, name)) for name in (weights, CONFIG))
    return Checkpoint(path, "adapter", entries, files, (), config, notes)


def read_adapter(checkpoint: Checkpoint) -> Adapter:
    """The factors by module name. Raises SourceError KB207 for what it is not and KB208 for what does not fit."""
    config = checkpoint.config or {}
    _refuse_others(checkpoint, config)
    sides: dict[str, dict[str, Entry]] = {}
    if not checkpoint.entries:
        raise SourceError("KB207", "the adapter holds no factors", at=checkpoint.where, hint="save it again with peft")
    for name, entry in checkpoint.entries.items():
        match = _FACTOR.fullmatch(name)
        if not match:
            hint = "only the factors of linear layers can be applied"
            raise SourceError(
                "KB207", f"the adapter's tensor {name!r} is no LoRA factor", at=checkpoint.where, hint=hint
            )
        if sides.setdefault(match["module"], {}).setdefault(match["side"], entry) is not entry:
            hint = "save each adapter into its own folder"
            message = f"two adapters are in one file: {name!r} is the second lora_{match['side']} of its module"
            raise SourceError("KB207", message, at=checkpoint.where, hint=hint)
    return Adapter(
        {m: _factors(checkpoint, config, m, pair) for m, pair in sides.items()}, bool(config.get("fan_in_fan_out"))
    )


def _refuse_others(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    initial = str(config.get("init_lora_weights")).lower()
    others = {
        f"peft_type {config.get('peft_type')!r}": config.get("peft_type") != "LORA",
        "bias": config.get("bias", "none") not in ("none", None) or config.get("lora_bias"),
        # These begin with a change of the base's own weights, which the adapter's files do not hold.
        f"init_lora_weights {initial!r}": initial.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
        **{what: config.get(key) for key, what in _NOT_YET.items()},
    }
    if found := [what for what, used in others.items() if used]:
        hint = "merge it into its base with peft and give that folder"
        raise SourceError(
            "KB207", f"the adapter uses {', '.join(found)}, which we cannot apply yet", at=checkpoint.where, hint=hint
        )


def _factors(checkpoint: Checkpoint, config: Mapping[str, Any], module: str, pair: Mapping[str, Entry]) -> Factors:
    def fail(message: str) -> SourceError:
        return SourceError(
            "KB208", f"{module}: {message}", at=checkpoint.where, hint="save the adapter again with peft"
        )

    if set(pair) != {"A", "B"}:
        raise fail("one of lora_A and lora_B is missing")
    a, b = pair["A"], pair["B"]
    if len(a.spec.shape) != 2 or len(b.spec.shape) != 2 or a.spec.shape[0] != b.spec.shape[1]:
        raise fail(f"lora_A {a.spec} and lora_B {b.spec} do not fit each other")
    if not (a.spec.dtype.is_float and b.spec.dtype.is_float):
        raise fail(f"lora_A {a.spec} and lora_B {b.spec} are not both of floating point")
    rank = a.spec.shape[0]
    try:
        declared = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    except (re.error, RecursionError, OverflowError) as error:
        raise fail(f"a pattern of the config is no regular expression: {error}") from error
    if declared != rank:
        raise fail(f"its factors have rank {rank}, the config says {declared!r}")
    if type(alpha) not in (int, float) or not abs(alpha) < LARGEST_ALPHA or rank == 0:
        raise fail(f"lora_alpha {alpha!r} over rank {rank} is no scale")
    return Factors(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first key that PEFT takes for the module: a regular expression for the end of its name."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
