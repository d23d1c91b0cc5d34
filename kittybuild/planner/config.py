"""What a merge changes in config.json: the number of layers, lists with one entry a layer, the dtype. Nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kittybuild.tensors import DType

_COUNT = re.compile(r"(num_(hidden_|decoder_|encoder_)?layers?|n_layers?|(decoder|encoder)_layers|depth)")
_DTYPES = ("dtype", "torch_dtype")


def with_layers(config: Mapping[str, Any], old: int, layers: Sequence[int]) -> dict[str, Any]:
    """`config` for an output whose layer i is the donor's layer `layers[i]`; the donor had `old` layers.

    Counts that equal `old` become the new one, at any depth; lists of `old` entries under a name with `layer` in it
    follow their layers.
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            changed[key] = with_layers(value, old, layers)
        elif _COUNT.fullmatch(key) and value == old:
            changed[key] = len(layers)
        elif isinstance(value, list) and len(value) == old and "layer" in key and max(layers) < old:
            changed[key] = [value[index] for index in layers]
        else:
            changed[key] = value
    return changed


def with_dtype(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """`config` with the dtype of the weights, under the names that it uses already (`dtype` where it has none)."""
    changed = dict(config)
    for key in [key for key in _DTYPES if key in config] or ["dtype"]:
        changed[key] = dtype.torch_name
    for key, value in config.items():
        if isinstance(value, Mapping) and any(name in value for name in _DTYPES):
            changed[key] = with_dtype(value, dtype)
    return changed
