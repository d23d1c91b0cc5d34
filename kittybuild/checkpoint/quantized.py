"""Quantized tensors and their scales as the plain tensors that they stand for. Each scale is used, noted or refused.

A config that says how the tensors are stored says it of the checkpoint, not of what is read from it: it is taken out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kittybuild.checkpoint import mxfp4, scaled
from kittybuild.checkpoint.source import Entry
from kittybuild.checkpoint.state_dict import some
from kittybuild.errors import SourceError
from kittybuild.tensors import DType

KEYS = ("quantization_config", "compression_config")

_PLAIN = (DType.BF16, DType.F16, DType.F32)
# Of the arithmetic in FP8 and of caches, not of the weights.
_RUNTIME = re.compile(
    r"(?:.*[._])?(?:(?:input|output|activation|act|[qkv]|kv)_scale|input_scale_ub|input_global_scale)"
)


@dataclass(frozen=True, slots=True)
class Plain:
    """Tensors as they are read, the config that fits them, and what a person should know."""

    entries: Mapping[str, Entry]
    config: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


def dequantized(where: str, entries: Mapping[str, Entry], config: Mapping[str, Any] | None) -> Plain:
    """FP8 weights with scales and MXFP4 experts as plain tensors, of the config's dtype or else bfloat16.

    All other tensors stay as they are. Raises SourceError KB225 where scales and weights do not fit each other.
    """
    told = list(_told(config or {}))
    dtype = _dtype(config or {})
    made: dict[str, Entry] = {}
    used: set[str] = set()
    for entry in entries.values():
        if scale := _scale_of(entry, entries):
            made[entry.name] = scaled.with_scale(where, entry, scale, _blocks(told), dtype)
            used.add(scale.name)
        elif mxfp4.is_packed(entry) and (scale := entries.get(_scales_name(entry))):
            made[entry.name] = mxfp4.with_scales(where, entry, scale, dtype)
            used.add(scale.name)
    if not made:
        words = sorted({str(part.get("quant_method", "quantized")) for part in told})
        return Plain(entries, config, (f"its config says {', '.join(words)}: read as stored",) if words else ())
    runtime = [
        name
        for name, entry in entries.items()
        if _RUNTIME.fullmatch(name) and entry.spec.numel == 1 and name not in used
    ]
    left = {name: entry for name, entry in entries.items() if name not in (used | set(runtime))}
    _refuse_others(where, (entry for name, entry in left.items() if name not in made))
    found = {made.get(name, entry).name: made.get(name, entry) for name, entry in left.items()}
    if len(found) != len(left):
        twice = Counter(made.get(name, entry).name for name, entry in left.items()).most_common(1)[0][0]
        raise SourceError("KB225", f"{twice!r} is there both quantized and not", at=where, hint="delete one of them")
    notes = [f"not used, since they are for arithmetic in FP8: {some(runtime)}"] if runtime else []
    return Plain(found, without(config) if config is not None else None, tuple(notes))


def quantized_note(entries: Iterable[Entry]) -> tuple[str, ...]:
    """A note on how many tensors are stored in quantized types, and what they are read as; none if none are."""
    found = [entry for entry in entries if entry.quantized]
    if not found:
        return ()
    counts = Counter(entry.quantized for entry in found)
    stored = ", ".join(f"{count} as {kind}" for kind, count in sorted(counts.items(), key=str))
    dtypes = sorted({entry.spec.dtype.torch_name for entry in found})
    return (f"quantized: of its tensors, {stored}, are read as {' and '.join(dtypes)}",)


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without a word on quantisation, at any depth."""
    return {
        key: without(value) if isinstance(value, Mapping) else value for key, value in config.items() if key not in KEYS
    }


def _told(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every quantization_config in a config."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key in KEYS:
                yield value
            else:
                yield from _told(value)


def _blocks(told: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    """The size of the blocks that the config tells, else the usual one."""
    for part in told:
        groups = part.get("config_groups")
        inner = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
        weights = [each for each in inner if isinstance(each, Mapping)]
        sizes = [part.get("weight_block_size"), *(each.get("block_structure") for each in weights)]
        for size in (*sizes, *([1, each.get("group_size")] for each in weights)):
            if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
                return tuple(size)
    return scaled.USUAL_BLOCKS


def _dtype(config: Mapping[str, Any]) -> DType:
    """The dtype that the config has for weights, if it is plain."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            found = DType.named(part[key]) if isinstance(part.get(key), str) else None
            if found in _PLAIN:
                return found
    return DType.BF16


def _scale_of(entry: Entry, entries: Mapping[str, Entry]) -> Entry | None:
    if entry.spec.dtype not in scaled.STORED:
        return None
    return next((entries[entry.name + end] for end in scaled.SUFFIXES if entry.name + end in entries), None)


def _scales_name(blocks: Entry) -> str:
    return blocks.name.removesuffix(mxfp4.BLOCKS) + mxfp4.SCALES


def _refuse_others(where: str, entries: Iterable[Entry]) -> None:
    """Among tensors with scales, one in FP8 without is a part of something that we do not know."""
    others = [entry.name for entry in entries if entry.spec.dtype in scaled.STORED or mxfp4.is_packed(entry)]
    if others:
        message = f"quantized tensors without scales of their own: {some(others)}"
        raise SourceError("KB225", message, at=where, hint="use the checkpoint before quantisation")
