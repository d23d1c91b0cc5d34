"""The Merkle root of a checkpoint: one digest over the name, content, dtype and shape of every tensor.

The leaves are in the order of the names (as UTF-8); two neighbours make a node, and one without a neighbour goes up as
it is. Equal roots, equal tensors, however they lie in shards and whatever made them.
"""

from __future__ import annotations

from collections.abc import Mapping

from kittybuild.digest import Digest, tagged
from kittybuild.tensors import TensorRef

LEAF, NODE = "kittybuild.merkle-leaf.v1", "kittybuild.merkle-node.v1"


def leaf(name: str, ref: TensorRef) -> Digest:
    """The leaf of one tensor."""
    return tagged(LEAF, [name, *ref.to_json()])


def root(tensors: Mapping[str, TensorRef]) -> Digest:
    """The root over tensors by name; of none, a node without children."""
    level = [leaf(name, tensors[name]) for name in sorted(tensors, key=lambda name: name.encode())]
    while len(level) > 1:
        pairs = [level[at : at + 2] for at in range(0, len(level), 2)]
        level = [tagged(NODE, [left.hex, rest[0].hex]) if rest else left for left, *rest in pairs]
    return level[0] if level else tagged(NODE, [])
