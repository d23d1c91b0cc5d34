"""PEFT LoRA adapters: which factors belong to which module, and with what scale; what they hold whole.

What we cannot apply exactly is a SourceError that names it, never ignored.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kittybuild.checkpoint.folder import inside, read_json, read_weights
from kittybuild.checkpoint.source import Checkpoint, FileId
from kittybuild.errors import SourceError
from kittybuild.tensors import Shape, TensorSpec

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LARGEST_ALPHA = 1e30
LONGEST_MODULE = 512
_END = r"(?:\.(?!weight$)[^.]+)?"
_NAMES = tuple(
    re.compile(rf"(?:base_model\.model\.)?(?P<module>.+)\.{rest}")
    for rest in (
        rf"lora_(?P<part>[AB]){_END}\.weight",
        r"lora_embedding_(?P<part>[AB])(?:\.[^.]+)?",
        r"lora_(?P<part>magnitude)_vector(?:\.[^.]+)?",
        rf"lora_B{_END}\.(?P<part>bias)",
    )
)
_WHOLE = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?P<layer>\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<last>weight|bias)"
)
_NOT_YET = MappingProxyType(
    {
        "use_qalora": "QALoRA",
        "use_bdlora": "block-diagonal factors",
        "kasa_config": "KaSA",
        "monteclora_config": "MonteCLoRA",
        "arrow_config": "Arrow routing",
        "alora_invocation_tokens": "activated LoRA",
        "layer_replication": "layer_replication",
        "target_parameters": "target_parameters",
        "trainable_token_indices": "trainable tokens",
    }
)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an adapter."""

    name: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's factors, A [r, in] and B [out, r], of a convolution A [r, in, ...] and B [out, r, 1, ...].

    `scale`: alpha / r (rsLoRA: alpha / sqrt r). `magnitude`: of DoRA. `embedding`: of a table, kept as [in, out].
    """

    a: Part
    b: Part
    scale: float
    magnitude: Part | None = None
    embedding: bool = False

    @property
    def matrix(self) -> Shape:
        """The shape of what they change, kept as [out, in]."""
        return (self.b.spec.shape[0], *self.a.spec.shape[1:])


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter holds. `transposed`: the base keeps linear layers' weights as [in, out] (fan_in_fan_out).

    `whole`: tensors of the base by name, and what takes their place. `added`: biases by name, and what is added to them
    times a scale.
    """

    modules: Mapping[str, Factors]
    transposed: bool
    whole: Mapping[str, Part] = field(default_factory=dict)
    added: Mapping[str, tuple[Part, float]] = field(default_factory=dict)


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
    """What an adapter's folder holds; see `adapter_of`."""
    specs = {name: entry.spec for name, entry in checkpoint.entries.items()}
    return adapter_of(checkpoint.where, checkpoint.config or {}, specs)


def adapter_of(where: str, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Adapter:
    """The factors by module, and what is held whole. Raises SourceError KB207 for what it is not, and KB208 for what
    does not fit."""
    _refuse_others(where, config)
    sides: dict[str, dict[str, Part]] = {}
    embeddings: set[str] = set()
    whole: dict[str, Part] = {}
    for name, spec in specs.items():
        part = Part(name, spec)
        match = next(filter(None, (pattern.fullmatch(name) for pattern in _NAMES)), None)
        if match:
            if sides.setdefault(match["module"], {}).setdefault(match["part"], part) is not part:
                hint = "save each adapter into its own folder"
                what = match["part"] if match["part"] not in "AB" else f"lora_{match['part']}"
                message = f"two adapters are in one file: {name!r} is the second {what} of its module"
                raise SourceError("KB207", message, at=where, hint=hint)
            embeddings |= {match["module"]} if "lora_embedding" in name else set()
        elif target := _whole(name, config):
            whole[target] = part
        else:
            hint = "no part of a LoRA adapter that its config speaks of has such a name"
            raise SourceError("KB207", f"the adapter's tensor {name!r} is no LoRA factor", at=where, hint=hint)
    if not sides and not whole:
        raise SourceError("KB207", "the adapter holds no factors", at=where, hint="save it again with peft")
    reading = _Reading(where, config)
    factors = {m: reading.factors(m, parts, embedding=m in embeddings) for m, parts in sides.items()}
    added = {f"{m}.bias": (parts["bias"], factors[m].scale) for m, parts in sides.items() if "bias" in parts}
    return Adapter(factors, bool(config.get("fan_in_fan_out")), whole, added)


def _whole(name: str, config: Mapping[str, Any]) -> str | None:
    """The name of the base's tensor whose place a tensor takes, as the config allows it; else None."""
    match = _WHOLE.fullmatch(name)
    if match is None or ".lora_" in name:
        return None
    module, last = match["module"], match["last"]
    saved = config.get("modules_to_save") or ()
    if (match["layer"] or "") == ".base_layer":
        allowed = last == "weight" or config.get("bias") in ("all", "lora_only")
    else:
        allowed = any(module.endswith(str(end)) for end in saved)
        allowed = allowed or (last == "bias" and config.get("bias") == "all")
        allowed = allowed or bool(config.get("ensure_weight_tying") and saved)
    return f"{module}.{last}" if allowed else None


def _refuse_others(where: str, config: Mapping[str, Any]) -> None:
    initial = str(config.get("init_lora_weights")).lower()
    others = {
        f"peft_type {config.get('peft_type')!r}": config.get("peft_type") != "LORA",
        f"bias {config.get('bias')!r}": config.get("bias", "none") not in ("none", "all", "lora_only", None),
        # These begin with a change of the base's own weights, which the adapter's files do not hold.
        f"init_lora_weights {initial!r}": initial.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
        **{what: config.get(key) for key, what in _NOT_YET.items()},
    }
    if found := [what for what, used in others.items() if used]:
        hint = "merge it into its base with peft and give that folder"
        message = f"the adapter uses {', '.join(found)}, which we cannot apply yet"
        raise SourceError("KB207", message, at=where, hint=hint)


@dataclass(frozen=True, slots=True)
class _Reading:
    """An adapter's config, for one module after the other."""

    where: str
    config: Mapping[str, Any]

    def fail(self, module: str, message: str) -> SourceError:
        """The error KB208 for a module."""
        return SourceError("KB208", f"{module}: {message}", at=self.where, hint="save the adapter again with peft")

    def factors(self, module: str, parts: Mapping[str, Part], *, embedding: bool) -> Factors:
        """A module's factors, which fit each other and the config."""
        if not {"A", "B"} <= set(parts):
            raise self.fail(module, "one of lora_A and lora_B is missing")
        a, b, magnitude = parts["A"], parts["B"], parts.get("magnitude")
        first, second = a.spec.shape, b.spec.shape
        ones = tuple(1 for _ in second[2:])
        if len(first) < 2 or len(second) != len(first) or first[0] != second[1] or second[2:] != ones:
            raise self.fail(module, f"lora_A {a.spec} and lora_B {b.spec} do not fit each other")
        if not (a.spec.dtype.is_float and b.spec.dtype.is_float):
            raise self.fail(module, f"lora_A {a.spec} and lora_B {b.spec} are not both of floating point")
        dora = bool(self.config.get("use_dora"))
        if dora != (magnitude is not None) or (magnitude and magnitude.spec.numel != second[0]):
            found = magnitude.spec if magnitude else "none"
            raise self.fail(module, f"use_dora is {str(dora).lower()}, and its magnitude vector is {found}")
        if magnitude and (embedding or len(first) > 2 or self.config.get("fan_in_fan_out")):
            raise self.fail(module, "DoRA can be applied to linear layers that keep their weights as [out, in] only")
        return Factors(a, b, self.scale(module, first[0]), magnitude, embedding)

    def scale(self, module: str, rank: int) -> float:
        """What PEFT multiplies the product of a module's factors by."""
        config = self.config
        try:
            declared = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
            alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        except (re.error, RecursionError, OverflowError, ValueError) as error:
            raise self.fail(module, f"a pattern of the config cannot be used: {error}") from error
        if declared != rank:
            raise self.fail(module, f"its factors have rank {rank}, the config says {declared!r}")
        if type(alpha) not in (int, float) or not abs(alpha) < LARGEST_ALPHA or rank == 0:
            raise self.fail(module, f"lora_alpha {alpha!r} over rank {rank} is no scale")
        return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first key that PEFT takes for the module: a regular expression for the end of its name."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({_bounded(pattern, module)})$", module):
            return value
    return default


def _bounded(pattern: str, module: str) -> str:
    """The pattern, if it cannot keep us busy for long: at most two repeats, of one character or class each.

    Raises ValueError for any other; Python's expressions can take time that is exponential in the length of a name.
    """
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "c", pattern).replace("(?:", "(")
    choices, repeats = plain.count("?") + plain.count("|"), len(re.findall(r"[*+{]", plain))
    if re.search(r"\)[*+{]|\(\?|[?*+}][*+{]", plain) or re.search(r"\\[1-9]", pattern) or repeats > 2 or choices > 8:
        raise ValueError(f"{pattern!r:.80} repeats too much")
    if len(module) > LONGEST_MODULE:
        raise ValueError(f"a name of {len(module)} characters")
    return pattern
