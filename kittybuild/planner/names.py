"""What tensor names tell: layers, stacks, and the order for people. No table of architectures.

A layer's number is the first `.digits.` of a name; what stands before it is the stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<index>[0-9]{1,9})\.(?P<rest>.*)", re.DOTALL)
_DIGITS = re.compile(r"([0-9]+)")
_FIRST = re.compile(r"emb|wte|wpe|vision|visual|image|audio|speech|projector|connector")
_LAST = re.compile(r"unembed|embed_out|lm_head")
_VOCABULARY = re.compile(
    r"(^|[._])(embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|embed_out|lm_head)[._]weight"
)


@dataclass(frozen=True, slots=True)
class LayerName:
    """A tensor's name, taken apart at its layer number."""

    stack: str
    index: int
    rest: str

    def at(self, index: int) -> str:
        """The same tensor's name in another layer."""
        return f"{self.stack}.{index}.{self.rest}"


def layer_of(name: str) -> LayerName | None:
    """The layer that a tensor belongs to, or None (embeddings, final norm, head)."""
    match = _LAYER.fullmatch(name)
    return LayerName(match["stack"], int(match["index"]), match["rest"]) if match else None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """The stacks of layers, each with how many layers it has."""
    found: dict[str, int] = {}
    for name in names:
        if layer := layer_of(name):
            found[layer.stack] = max(found.get(layer.stack, 0), layer.index + 1)
    return found


def before_layers(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: of an embedding, of what sees or hears, and no head."""
    return bool(_FIRST.search(name)) and not _LAST.search(name)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token: token embeddings and heads, by the names that models give them."""
    return bool(_VOCABULARY.search(name))


def natural(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """A sort key in which layer 2 comes before layer 10."""
    parts = _DIGITS.split(name)  # texts and numbers take turns, and a longer number is a larger one
    numbers = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = numbers
    return tuple((len(part) if index % 2 else 0, part) for index, part in enumerate(parts)), name
