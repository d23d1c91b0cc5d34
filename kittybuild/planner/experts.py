"""Experts in one tensor or in many: two layouts of the same numbers. The fused one is the others, end to end.

Fused: `experts.gate_up_proj` [experts, 2 x inner, width] and `experts.down_proj` [experts, width, inner]. Split:
`experts.N.gate_proj.weight` and `up_proj` [inner, width], `down_proj` [width, inner]; Mixtral calls them w1, w3 and w2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.source import piece
from kittybuild.model.derivation import Derivation, Input, SourceTensor
from kittybuild.planner.views import View
from kittybuild.tensors import TensorSpec

_SPLIT = re.compile(r"(.*\.experts)\.([0-9]+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(.*\.)(?:block_sparse_moe|mlp)\.gate\.(weight|e_score_correction_bias)")
_WORDS: Mapping[str, str] = MappingProxyType(
    {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
)

Split = tuple[str, int, str]
"""A matrix of an expert: the experts that it is one of, its number, and `gate`, `up` or `down`."""


@dataclass
class Layout:
    """A model's experts in another's layout. `used`: the names that they had. `views`: tensors that are parts of
    others, or others under a new name. `joins`: tensors that have to be made."""

    used: set[str] = field(default_factory=set)
    views: dict[str, Input] = field(default_factory=dict)
    joins: dict[str, Derivation] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.used)


def layout_like(view: View, reference: View, builders: Builders) -> Layout:
    """The experts of `view` as `reference` has them, as far as they are the same matrices in another layout."""
    found = Layout()
    missing = {name: given.spec for name, given in reference.tensors.items() if name not in view.tensors}
    if not any(_SPLIT.fullmatch(name) or _FUSED.fullmatch(name) for name in missing):
        return found
    split, wanted = _split(view), _split(reference)
    fused = {(_stem(m[1]), m[2]): name for name in view.tensors if (m := _FUSED.fullmatch(name))}
    for name, spec in missing.items():
        if match := _FUSED.fullmatch(name):
            _join(name, spec, _members(match, spec), split, view, builders, found)
        elif key := _split_key(name):
            if key in split and split[key] not in reference.tensors:
                found.views[name] = view.tensors[split[key]]
                found.used.add(split[key])
            elif whole := fused.get((key[0], "down_proj" if key[2] == "down" else "gate_up_proj")):
                _cut(name, spec, key, whole, wanted, view, builders, found)
        elif (router := _ROUTER.fullmatch(name)) and (other := _router(router, view)):
            found.views[name] = view.tensors[other]
            found.used.add(other)
    return found


def _stem(text: str) -> str:
    return text.replace(".block_sparse_moe.", ".mlp.")


def _split_key(name: str) -> Split | None:
    match = _SPLIT.fullmatch(name)
    return (_stem(match[1]), int(match[2]), _WORDS[match[3]]) if match else None


def _split(view: View) -> dict[Split, str]:
    return {key: name for name in view.tensors if (key := _split_key(name))}


def _router(match: re.Match[str], view: View) -> str | None:
    names = [f"{match[1]}{block}.gate.{match[2]}" for block in ("block_sparse_moe", "mlp")]
    return next((name for name in names if name in view.tensors), None)


def _members(match: re.Match[str], spec: TensorSpec) -> list[Split]:
    """The matrices of a fused tensor, in the order in which they lie in it."""
    words = ("gate", "up") if match[2] == "gate_up_proj" else ("down",)
    return [(_stem(match[1]), expert, word) for expert in range(spec.shape[0]) for word in words]


def _shape(fused: tuple[int, ...], word: str) -> tuple[int, ...]:
    """The shape of one matrix of a fused tensor."""
    _, rows, columns = fused
    return (rows, columns) if word == "down" else (rows // 2, columns)


def _join(
    name: str,
    spec: TensorSpec,
    members: list[Split],
    split: Mapping[Split, str],
    view: View,
    builders: Builders,
    found: Layout,
) -> None:
    """A fused tensor, if `view` has just its matrices."""
    stem, last, _ = members[-1]
    if len(spec.shape) != 3 or any(key not in split for key in members) or (stem, last + 1, members[0][2]) in split:
        return
    inputs = tuple(view.tensors[split[key]] for key in members)
    dtypes = {given.spec.dtype for given in inputs}
    if len(dtypes) > 1 or any(
        given.spec.shape != _shape(spec.shape, key[2]) for given, key in zip(inputs, members, strict=True)
    ):
        return
    made = TensorSpec(dtypes.pop(), spec.shape)
    found.joins[name] = Derivation("join", builders["join"].version, {}, inputs, made)
    found.used |= {split[key] for key in members}


def _cut(
    name: str,
    spec: TensorSpec,
    key: Split,
    whole: str,
    wanted: Mapping[Split, str],
    view: View,
    builders: Builders,
    found: Layout,
) -> None:
    """One matrix of a fused tensor that `view` has: of a source, it is some bytes of the file."""
    stem, expert, word = key
    given = view.tensors[whole]
    if len(given.spec.shape) != 3 or _shape(given.spec.shape, word) != spec.shape:
        return
    shape, experts = spec.shape, given.spec.shape[0]
    if (stem, experts - 1, word) not in wanted or (stem, experts, word) in wanted:
        return
    size = shape[0] * shape[1]
    start = expert * given.spec.numel // experts + (size if word == "up" else 0)
    made = TensorSpec(given.spec.dtype, shape)
    if isinstance(given, SourceTensor) and given.name not in view.encoded:
        found.views[name] = SourceTensor(given.source, piece(given.name, start, shape), made)
    else:
        found.joins[name] = Derivation("cut", builders["cut"].version, {"start": start}, (given,), made)
    found.used.add(whole)
