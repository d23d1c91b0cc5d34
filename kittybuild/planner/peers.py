"""How merges of each class of arithmetic are lowered: what the peers do otherwise than kitty-1, as one value a class.

A class that is not named here is lowered as kitty-1 is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from kittybuild.tensors import DType, Shape, TensorSpec

Fitted = tuple[Shape, tuple[int, ...]]
"""The shape of an output, and which of the inputs take part in it."""

DIFFERENCES = frozenset(
    ("task_arithmetic", "ties", "dare_ties", "dare_linear", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a class does at the edges of its arithmetic. Nothing said: what kitty-1 does.

    `peer`: inputs are cast to `dtype` as they are loaded, the result is of the dtype that torch promotes them to, and
    bits depend on the machine. The rest is of peers only, by method:
    `of_base`: the result has the dtype of the base. `widens`: it is of float32 at least. `crops`: vocabularies of
    unequal sizes are cut to what all have. `crops_to_base`: they are cut to the base's, and a model's other tensors of
    another shape are left out. `as_listed`: with that parameter given, the inputs go in as the text lists them, and the
    base is one of them. `numpy`: the arithmetic is numpy's, whose version counts. `tail`: where in a gradient stands
    what follows the layers. `counts`: the tool computes with integers as well, where we take them over. `rebuilds`: it
    makes the tokenizer of the base anew where none is asked for.
    """

    peer: bool = False
    tail: float = 0.0
    of_base: frozenset[str] = frozenset()
    widens: frozenset[str] = frozenset()
    crops: frozenset[str] = frozenset()
    crops_to_base: frozenset[str] = frozenset()
    as_listed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    numpy: frozenset[str] = frozenset()
    counts: bool = False
    rebuilds: bool = False

    def promoted(self, method: str, specs: Sequence[TensorSpec], base: int | None, dtype: DType | None = None) -> DType:
        """The dtype of a peer's result. `base`: which of the inputs is the base; `dtype`: what all are cast to."""
        dtypes = {spec.dtype for spec in specs}
        if dtype:
            dtypes = {dtype}
        elif method in self.of_base and base is not None:
            dtypes = {specs[base].dtype}
        if len(dtypes) == 1 and method not in self.widens:
            return dtypes.pop()
        return DType.F64 if DType.F64 in dtypes else DType.F32  # the half widths have no other dtype in common

    def fitted(self, method: str, specs: Sequence[TensorSpec], base: int | None, *, vocabulary: bool) -> Fitted | None:
        """What is merged of inputs whose shapes differ; None where they cannot be merged."""
        shapes = [spec.shape for spec in specs]
        table = vocabulary and all(len(shape) == 2 for shape in shapes)
        everything = tuple(range(len(specs)))
        if method in self.crops and table:
            return tuple(map(min, zip(*shapes, strict=True))), everything
        if method in self.crops_to_base and base is not None:
            wanted = shapes[base]
            if not vocabulary:
                return wanted, tuple(index for index in everything if shapes[index] == wanted)
            if table and all(have >= want for shape in shapes for have, want in zip(shape, wanted, strict=True)):
                return wanted, everything
        return None


_CROPS = frozenset({"linear", "slerp", "nuslerp", "model_stock", "arcee_fusion"})
_KITTY_DIFFERENCES = DIFFERENCES | {"sce", "consensus_ta", "consensus_ties"}
_RULES: Mapping[str, Rules] = MappingProxyType(
    {
        "mergekit-0.1.5": Rules(peer=True, widens=frozenset({"arcee_fusion", "ramplus_tl"})),
        "mergekit-0.1.4": Rules(
            peer=True,
            of_base=DIFFERENCES | {"slerp"},
            widens=frozenset({"arcee_fusion"}),
            crops=_CROPS,
            crops_to_base=DIFFERENCES,
            numpy=frozenset({"slerp"}),
            counts=True,
        ),
        "mergekitty-0.3": Rules(
            peer=True,
            tail=1.0,
            of_base=_KITTY_DIFFERENCES | {"nearswap"},
            crops=frozenset({"linear", "slerp", "model_stock", "nearswap"}),
            crops_to_base=_KITTY_DIFFERENCES,
            as_listed=MappingProxyType({"slerp": "t"}),
            counts=True,
            rebuilds=True,
        ),
    }
)


def rules_of(numerics: str) -> Rules:
    """The rules of a class."""
    return _RULES.get(numerics, Rules())
