"""One digest for all that a peer, or kittybuild in its numerics, makes of a case."""

from __future__ import annotations

from collections.abc import Mapping

from blake3 import blake3
from torch import Tensor

from kittybuild.planner.names import is_vocabulary
from tests.jobs import bits, spec_of
from tests.parity.exact_cases import Case


def shown_only(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a case compares."""
    return {name: tensor for name, tensor in tensors.items() if case.vocabulary or not is_vocabulary(name)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Over names, dtypes, shapes and bytes, in the order of the names."""
    hasher = blake3()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {spec_of(tensor)}\n".encode())
        hasher.update(bits(tensor))
    return hasher.hexdigest()[:32]
