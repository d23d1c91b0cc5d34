"""What a merge changes in config.json: the number of layers, what is listed by layer, the dtype. Nothing else."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kittybuild.planner.towers import EXTRA_LAYERS, KeyPath, Tower, counts_in
from kittybuild.tensors import DType

_DTYPES = ("dtype", "torch_dtype")
_BY_LAYER = re.compile(r"layer|block|pattern|types|_size$|heads|multipliers|theta")
_NOT_BY_LAYER = re.compile(
    r"token|image|patch|kernel|stride|section|factor|mean|std|architectures|label|out_(indices|features)|limit|range"
    r"|dtype|lang"
)
_INDICES = re.compile(r"(layers|idxs?|indices|indexes|layer_ids)$")
_ALWAYS_INDICES = re.compile(r"(mlp_only_layers|moe_layers|cross_attention_layers|idxs?|indices|indexes|layer_ids)$")
_LEADING = frozenset({"first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index"})
_TRAILING = frozenset({"num_kv_shared_layers"})
_LAST = frozenset({"moe_layer_end_index"})
_PERIODIC = re.compile(
    r"(.*_(period|interval)|.*every_n.*|sliding_window_pattern|decoder_sparse_step|moe_layer_freq|interleave_moe_layer_step)"
)
FEW = 8
"""A list of so many entries or fewer is one by layer only if its name says so: others are as short by chance."""


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where a layer of the output comes from: a layer of a model, by the model's tower and config."""

    config: Mapping[str, Any]
    tower: Tower
    layer: int


@dataclass
class _Change:
    """One config on its way to other layers. `doubts`: keys that cannot say what the layers are now."""

    tower: Tower
    origins: Sequence[LayerOrigin]
    doubts: list[str] = field(default_factory=list)

    def section(self, config: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        """A part of the config that counts the tower's layers, or holds one that does."""
        counting = any(key[:-1] == path for key in self.tower.keys)
        changed: dict[str, Any] = {}
        listed = False
        for key, value in config.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                inside = counting and not any(counts_in(value))
                holds = any(other[: len(here)] == here for other in self.tower.keys)
                changed[key] = self.section(value, here) if inside or holds else value
            else:
                inside = counting or not any(counts_in(config))
                changed[key] = self._value(here, value) if inside else value
                listed |= inside and isinstance(value, list) and "types" in key
        if listed:  # then nobody asks the period
            self.doubts = [key for key in self.doubts if not _PERIODIC.fullmatch(key)]
        return changed

    def _value(self, path: KeyPath, value: Any) -> Any:
        key, old = path[-1], self.tower.count
        if path in self.tower.keys:
            return len(self.origins) - self._extra()
        if isinstance(value, str) and len(value) == old and "pattern" in key:
            return "".join(self._picked(path, value))
        if isinstance(value, list):
            return self._list(path, value)
        if type(value) is not int:
            return value
        if key in EXTRA_LAYERS and self.tower.body < old:
            return self._extra()
        if key in _LEADING and value <= old:
            return self._leading(key, [origin.layer < value for origin in self.origins])
        if key in _LAST and 0 <= value < old:
            return self._leading(key, [origin.layer <= value for origin in self.origins]) - 1
        if key in _TRAILING:
            return self._leading(key, [origin.layer >= old - value for origin in reversed(self.origins)])
        if _PERIODIC.fullmatch(key) and value > 1:
            self._check_period(key, value)
        return value

    def _extra(self) -> int:
        """How many layers of the output predict further tokens."""
        return sum(origin.layer >= origin.tower.body for origin in self.origins)

    def _leading(self, key: str, marks: list[bool]) -> int:
        """How many layers in a row have the mark; a later one cannot be said by a number."""
        count = marks.index(False) if False in marks else len(marks)
        if any(marks[count:]):
            self.doubts.append(key)
        return count

    def _check_period(self, key: str, period: int) -> None:
        if any(origin.layer % period != index % period for index, origin in enumerate(self.origins)):
            self.doubts.append(key)

    def _list(self, path: KeyPath, value: list[Any]) -> list[Any]:
        key, old = path[-1], self.tower.body
        if key == "attention_types" and len(flat := _expanded(value)) == old:
            return [[[flat[origin.layer] for origin in self.origins], 1]]
        if _is_indices(key, value, self.tower.count):
            marked = [origin.layer in _at(origin.config, path, value) for origin in self.origins]
            return [index for index, mark in enumerate(marked) if mark]
        named = _BY_LAYER.search(key) or old > FEW
        if len(value) in (old, self.tower.count) and named and not _NOT_BY_LAYER.search(key):
            return self._picked(path, value)
        return value

    def _picked(self, path: KeyPath, own: Sequence[Any]) -> list[Any]:
        """The entry of each layer, from the config of the model that it comes from."""
        found = []
        for origin in self.origins:
            listed = _at(origin.config, path, own)
            if origin.layer >= len(own if len(listed) <= origin.layer else listed):
                continue  # the list says nothing of the layers that predict further tokens
            found.append((own if len(listed) <= origin.layer else listed)[origin.layer])
        return found


def with_layers(
    config: Mapping[str, Any], tower: Tower, origins: Sequence[LayerOrigin]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`config` for an output whose layers come from `origins`, and the keys in it that can no longer say what they are.

    In the part that counts the tower's layers, the count becomes the new one, lists with an entry for each layer
    and lists of layer numbers follow the layers, under any name, and so do numbers of first or last layers.
    """
    change = _Change(tower, origins)
    return change.section(config, ()), tuple(change.doubts)


def _at(config: Mapping[str, Any], path: KeyPath, otherwise: Sequence[Any]) -> Sequence[Any]:
    """The list at a path of a config, if there is one."""
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, (list, str)) else otherwise


def _is_indices(key: str, value: list[Any], count: int) -> bool:
    """Whether a list holds numbers of layers, rather than an entry for each."""
    if not _INDICES.search(key) or _NOT_BY_LAYER.search(key) or not all(type(item) is int for item in value):
        return False
    rising = all(one < next_one for one, next_one in itertools.pairwise(value))
    if not rising or not all(0 <= item < count for item in value):
        return False
    return len(value) < count or count > 2 or bool(_ALWAYS_INDICES.search(key))


def _expanded(value: list[Any]) -> list[Any]:
    """GPT-Neo's `[[["global", "local"], 6]]` as a flat list; empty where it is something else."""
    try:
        return [kind for kinds, times in value for _ in range(times) for kind in kinds]
    except (TypeError, ValueError):
        return []


def with_dtype(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """`config` with the dtype of the weights, under the names that it uses already (`dtype` where it has none)."""
    changed = dict(config)
    for key in [key for key in _DTYPES if key in config] or ["dtype"]:
        changed[key] = dtype.torch_name
    for key, value in config.items():
        if isinstance(value, Mapping) and any(name in value for name in _DTYPES):
            changed[key] = with_dtype(value, dtype)
    return changed
